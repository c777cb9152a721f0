"""Checkpoints: whole or not there at all, readable without running code, and the ones kept that should be."""

import io
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING

from moa_lightning.checkpoint_reading import _TableUnpickler, join_tensors, split_tensors
from moa_lightning.checkpoints import CheckpointQueue, RunCheckpointIO
from moa_lightning.errors import UserError
from moa_lightning.run_folder import last_checkpoint

OPTIMIZER = {
    "state": {"a.weight": {"step": torch.tensor(3.0), "exp_avg": torch.ones(2, 3)}},
    "param_groups": [{"lr": 0.1, "betas": (0.9, 0.95), "params": ["b", "a.weight"]}],
}
CHECKPOINT = {
    "state_dict": {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.zeros(4, dtype=torch.int64)},
    "optimizer_states": [OPTIMIZER],
    "global_step": 3,
    "callbacks": {"x": {"seen": [1, 2]}},
}


class Evil:
    """Runs a command when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"touch {self.canary}",)


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """A folder of shards with CHECKPOINT in it."""
    folder = tmp_path / "shards.ckpt"
    tensors, rest = split_tensors(CHECKPOINT)
    dcp.save(tensors, checkpoint_id=folder, no_dist=True)
    torch.save(rest, folder / "meta.pt")
    return folder


def test_tensors_and_the_rest_come_together_again():
    joined = join_tensors(*split_tensors(CHECKPOINT))
    assert joined.keys() == CHECKPOINT.keys()
    assert joined["optimizer_states"] == [OPTIMIZER]
    assert joined["state_dict"] == CHECKPOINT["state_dict"]


def test_shards_are_read_whole_with_optimiser_states_in_torchs_numbering(shards):
    read = RunCheckpointIO().load_checkpoint(shards)
    assert torch.equal(read["state_dict"]["a.weight"], CHECKPOINT["state_dict"]["a.weight"])
    assert read["state_dict"]["b"].dtype == torch.int64
    (optimizer,) = read["optimizer_states"]
    assert optimizer["param_groups"] == [{"lr": 0.1, "betas": (0.9, 0.95), "params": [0, 1]}]
    assert list(optimizer["state"]) == [1]
    assert torch.equal(optimizer["state"][1]["exp_avg"], torch.ones(2, 3))
    assert (read["global_step"], read["callbacks"]) == (3, {"x": {"seen": [1, 2]}})


def test_what_training_changes_after_a_save_is_not_in_it(tmp_path):
    plugin, weight = RunCheckpointIO(), torch.zeros(1000, 1000)
    plugin.save_checkpoint({"state_dict": {"w": weight}}, tmp_path / "a.ckpt")
    weight.fill_(1.0)
    plugin.teardown()
    assert not plugin.load_checkpoint(tmp_path / "a.ckpt")["state_dict"]["w"].any()


WRITER = """
import sys, torch
from moa_lightning.checkpoints import RunCheckpointIO
plugin = RunCheckpointIO()
for step in range(1000):
    plugin.save_checkpoint({"w": torch.full((1 << 20,), float(step))}, sys.argv[1])
    print(step, flush=True)
"""


def test_a_process_killed_while_it_writes_leaves_a_whole_checkpoint(tmp_path):
    path = tmp_path / "a.ckpt"
    for pause in (0.01, 0.05, 0.09):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True)
        assert writer.stdout is not None
        while writer.stdout.readline().strip() != "3":
            pass
        time.sleep(pause)
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        weight = RunCheckpointIO().load_checkpoint(path)["w"]
        assert weight[0] >= 2
        assert (weight == weight[0]).all()


def test_a_full_disk_is_one_sentence_and_the_checkpoint_before_it_stays(tmp_path):
    plugin = RunCheckpointIO()
    plugin.save_checkpoint({"w": torch.zeros(10)}, tmp_path / "old.ckpt")
    plugin.queue.wait()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))  # a file that grows past it fails as on a full disk
    try:
        plugin.save_checkpoint({"w": torch.zeros(1 << 20)}, tmp_path / "new.ckpt")
        plugin.remove_checkpoint(tmp_path / "old.ckpt")  # must not happen: the save that it waits for has failed
        with pytest.raises(UserError, match=r"new.ckpt could not be written \(File too large\)"):
            plugin.queue.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ["old.ckpt"]
    assert plugin.load_checkpoint(tmp_path / "old.ckpt")["w"].shape == (10,)


def test_after_a_failure_the_queue_goes_on():
    queue, seen = CheckpointQueue(), []
    queue.submit(lambda: seen.append(1 / 0))
    queue.submit(lambda: seen.append(1))
    with pytest.raises(ZeroDivisionError):
        queue.wait()
    queue.submit(lambda: seen.append(2))
    queue.wait()
    assert seen == [2]


@pytest.mark.parametrize("place", ["file", "meta.pt", ".metadata", "__0_0.distcp"])
def test_a_strangers_checkpoint_runs_no_code(tmp_path, shards, place):
    canary = tmp_path / "canary"
    path = tmp_path / "evil.ckpt" if place == "file" else shards / place
    if place == ".metadata":
        path.write_bytes(pickle.dumps(Evil(canary)))
    elif place == "__0_0.distcp":  # every shard, at the offsets that the table gives
        path.write_bytes(pickle.dumps(Evil(canary)) * 1000)
    else:
        torch.save({"global_step": 1, "state_dict": {}, "x": Evil(canary)}, path)
    with pytest.raises(UserError, match="is not read"):
        RunCheckpointIO().load_checkpoint(path if place == "file" else shards)
    assert not canary.exists()


@pytest.mark.parametrize("name", ["os.system", "pickle.loads", "FileSystemReader"])
def test_the_table_of_shards_may_name_its_own_classes_only(tmp_path, shards, name):
    module = b"torch.distributed.checkpoint.filesystem"
    word = name.encode()
    opcodes = b"\x8c" + bytes([len(module)]) + module + b"\x8c" + bytes([len(word)]) + word + b"\x93."
    (shards / ".metadata").write_bytes(b"\x80\x04" + opcodes)  # a name with dots reaches into what the module imports
    with pytest.raises(UserError, match="could run code"):
        RunCheckpointIO().load_checkpoint(shards)


@pytest.mark.parametrize("attribute", ["TORCH_CONTIGUOUS_FORMAT", "__class__"])
def test_the_table_may_look_up_members_of_its_enum_only(attribute):
    """Python 3.11.2 pickles a member of an enum as getattr(enum, name)."""

    class Lookup:
        def __reduce__(self):
            return getattr, (_MEM_FORMAT_ENCODING, attribute)

    table = _TableUnpickler(io.BytesIO(pickle.dumps(Lookup())))
    if attribute == "__class__":
        with pytest.raises(pickle.UnpicklingError, match="unsupported attribute"):
            table.load()
    else:
        assert table.load() is _MEM_FORMAT_ENCODING.TORCH_CONTIGUOUS_FORMAT


def test_damaged_shards_are_one_sentence(shards):
    os.truncate(shards / "__0_0.distcp", 40)
    with pytest.raises(UserError, match="it is damaged"):
        RunCheckpointIO().load_checkpoint(shards)


def test_without_its_link_the_newest_whole_checkpoint_is_the_last(tmp_path):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    assert last_checkpoint(tmp_path) is None
    for number, name in enumerate(("step0000010.ckpt", "step0000020.ckpt", "step0000030.ckpt.partial")):
        (folder / name).write_text("x")
        os.utime(folder / name, (number, number))
    assert last_checkpoint(tmp_path) == folder / "step0000020.ckpt"
    (folder / "last.ckpt").symlink_to("step0000010.ckpt")
    assert last_checkpoint(tmp_path) == folder / "last.ckpt"
    (folder / "step0000010.ckpt").unlink()  # the link leads nowhere now
    assert last_checkpoint(tmp_path) == folder / "step0000020.ckpt"


def test_a_link_replaces_a_link_a_file_and_a_folder(tmp_path, shards):
    plugin, name = RunCheckpointIO(), tmp_path / "last.ckpt"
    for before in ("nothing", "link", "file", "folder"):
        if before == "file":
            name.unlink()
            name.write_text("x")
        elif before == "folder":
            name.unlink()
            shutil.copytree(shards, name)
        plugin.link(shards, name)
        plugin.queue.wait()
        assert os.readlink(name) == "shards.ckpt"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.ckpt", "shards.ckpt"]
