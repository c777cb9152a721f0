"""Data of a stranger: tars, indices, images and folders that claim what is not so, or would grow without end."""

import io
import json
import os
import random
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from data import Images, ImageShards, TextShards
from data.image_base import MAX_PIXELS, MAX_SCANS, decode
from data.shards import MOST_CLASSES, ShardIndex, ShardMembers, expand
from moa_lightning.errors import UserError
from tests.data.conftest import picture, write_pictures
from tests.data.test_shards import png, write_tar
from tests.soak.mutations import damage


def header(name: bytes, size: bytes, kind: bytes = b"0", link: bytes = b"") -> bytes:
    """A tar header (ustar) with any bytes in it and a checksum that holds."""
    block = bytearray(512)
    block[:100] = name.ljust(100, b"\0")
    block[100:108], block[108:116], block[116:124] = b"0000644\0", b"0000000\0", b"0000000\0"
    block[124:136] = size.ljust(12, b"\0")
    block[136:148], block[148:156], block[156:157] = b"00000000000\0", b" " * 8, kind
    block[157:257], block[257:265] = link.ljust(100, b"\0"), b"ustar\x0000"
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


END = bytes(1024)
GOOD = header(b"a.txt", b"%011o" % 5) + b"hello".ljust(512, b"\0")
NEGATIVE = header(b"b.txt", b"\xff" * 10 + struct.pack(">h", -1024))
HUGE = header(b"b.txt", b"\x80" + b"\0" * 3 + struct.pack(">Q", 1 << 62))
LONG_CHAIN = header(b"././@LongLink", b"%011o" % 4, b"L") + b"abc\0".ljust(512, b"\0")
SPARSE = header(b"pax", b"%011o" % 29, b"x") + b"29 GNU.sparse.map=0,1,x,y\n   ".ljust(512, b"\0")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (GOOD + NEGATIVE + END, "inside another one|not an uncompressed tar"),
        (GOOD + HUGE + END, "unexpected end|not an uncompressed tar"),
        (LONG_CHAIN * 3000 + GOOD + END, "not an uncompressed tar"),
        (SPARSE + GOOD + END, "not an uncompressed tar|sparse|holds no samples"),
        (GOOD[:300], "not an uncompressed tar"),
        (b"\0" * 10240, "holds no samples"),
        (GOOD + header(b"a.cls", b"%011o" % 9) + b"9" * 9 + bytes(503) + END, "where a class number was expected"),
    ],
)
def test_headers_that_lie(tmp_path, content, message):
    path = tmp_path / "s.tar"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        ShardIndex(str(path))


def test_links_devices_and_folders_are_no_samples(tmp_path):
    secret = tmp_path / "secret.txt"
    secret.write_text("not yours")
    kinds = [(b"1", b"secret.txt"), (b"2", str(secret).encode()), (b"3", b""), (b"4", b""), (b"5", b""), (b"6", b"")]
    members = b"".join(header(b"%d.txt" % n, b"%011o" % 0, kind, link) for n, (kind, link) in enumerate(kinds))
    (tmp_path / "s.tar").write_bytes(members + GOOD + END)
    index = ShardIndex(str(tmp_path / "s.tar"))
    assert [record.key for record in index.records] == ["a"]


def test_absolute_and_parent_paths_are_keys_and_nothing_else(tmp_path):
    inside = tmp_path / "deep/er"
    names = ["/etc/x.txt", "../../up.txt", "a/../../b.txt", f"{tmp_path}/planted.txt"]
    path = write_tar(inside / "s.tar", [(name, b"planted " * 20) for name in names])
    before = {p for p in tmp_path.rglob("*") if not p.name.endswith(".index.json")}
    module = TextShards(path, val=path, context_length=16, batch_size=2)
    module.setup()
    list(module.train_dataloader())
    assert {p for p in tmp_path.rglob("*") if not p.name.endswith(".index.json")} == before
    assert [record.key for record in ShardIndex(path).records] == [name[:-4] for name in names]


def test_names_that_are_no_utf8_pass_through_the_index(tmp_path):
    (tmp_path / "s.tar").write_bytes(header(b"\xff\xfe.txt", b"%011o" % 1) + b"x".ljust(512, b"\0") + END)
    path = str(tmp_path / os.fsdecode(b"\xe9.tar"))
    os.rename(tmp_path / "s.tar", path)
    keys = [[record.key for record in ShardIndex(path).records] for _ in range(2)]  # scanned, then stored
    assert keys[0] == keys[1] == [b"\xff\xfe".decode("utf-8", "surrogateescape")]
    assert len(ShardMembers([path], ("txt",)).sha256()) == 64


SAMPLE = ["a", {"txt": [512, 5]}, -1]


@pytest.mark.parametrize(
    "samples",
    [
        [["a", {"txt": [512, 10**9]}, -1]],
        [["a", {"txt": [10**9, 5]}, -1]],
        [["a", {"txt": [-512, 5]}, -1]],
        [["a", {"txt": [512, -5]}, -1]],
        [["a", {"txt": [0, 5]}, -1]],
        [["a", {"txt": [513, 5]}, -1]],
        [["a", {"txt": [512.0, 5]}, -1]],
        [["a", {"txt": ["512", 5]}, -1]],
        [["a", {"txt": [512, True]}, -1]],
        [["a", {"txt": [512]}, -1]],
        [["a", {"txt": None}, -1]],
        [["a", {"pkl": [512, 5]}, -1]],
        [["a", {}, -1]],
        [["a", [], -1]],
        [["a", {"txt": [512, 5]}, -2]],
        [["a", {"txt": [512, 5]}, MOST_CLASSES]],
        [["a", {"txt": [512, 5]}, None]],
        [[7, {"txt": [512, 5]}, -1]],
        [["a", {"txt": [512, 5]}]],
        "abc",
        {"a": 1},
        None,
        7,
        [SAMPLE, None],
    ],
)
def test_a_stored_index_that_cannot_be_true_is_built_anew(tmp_path, samples):
    path = write_tar(tmp_path / "s.tar", [("a.txt", b"hello")])
    expected = ShardIndex(path).records
    stored = tmp_path / "s.tar.index.json"
    content = json.loads(stored.read_text())
    assert content["samples"] == [SAMPLE]
    stored.write_text(json.dumps({**content, "samples": samples}))
    assert ShardIndex(path).records == expected
    assert json.loads(stored.read_text())["samples"] == [SAMPLE]


@pytest.mark.parametrize("text", ["[" * 100_000, "[]", "3", '"x"', "{}", "null", "9" * 5000, " " * 1_000_000])
def test_a_stored_index_that_is_none(tmp_path, text):
    path = write_tar(tmp_path / "s.tar", [("a.txt", b"hello")])
    (tmp_path / "s.tar.index.json").write_text(text)
    assert ShardIndex(path).records == [("a", {"txt": (512, 5)}, -1)]


def test_an_index_is_neither_read_from_a_pipe_nor_written_through_a_link(tmp_path):
    path = write_tar(tmp_path / "s.tar", [("a.txt", b"hello")])
    os.mkfifo(tmp_path / "s.tar.index.json")  # to read it would wait for ever
    mine = tmp_path / "mine"
    mine.write_text("precious")
    (tmp_path / f".s.tar.index.json.{os.getpid()}").symlink_to(mine)
    assert len(ShardIndex(path)) == 1
    assert mine.read_text() == "precious"


@pytest.mark.parametrize(
    "pattern",
    ["{1..999999999999999999999}.tar", "{a,b}" * 40, "{" * 3000, "a{", "}", "{a..z}" * 9, "{{1..9999},{1..9999}}" * 9],
)
def test_patterns_that_would_fill_the_memory(pattern):
    with pytest.raises(UserError, match=r"must have braces that match and name 1,000,000 files at most"):
        expand(pattern)


@pytest.mark.parametrize(
    "pattern", ["pipe:touch canary", "{pipe:touch canary,b.tar}", "s3://b/k.tar", "file:///etc/x.tar"]
)
def test_commands_and_addresses(tmp_path, monkeypatch, pattern):
    monkeypatch.chdir(tmp_path)
    for module in (ImageShards(pattern), TextShards([pattern])):
        with pytest.raises(UserError, match=r"command or an address|does not exist"):
            module.prepare_data()
    assert list(tmp_path.iterdir()) == []


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def giant_png(width: int, height: int) -> bytes:
    """A few bytes that claim a huge picture."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def png_with(kind: bytes, content: bytes) -> bytes:
    good = png(0)
    return good[:33] + chunk(kind, content) + good[33:]


def giant_jpeg() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "JPEG")
    content = bytearray(buffer.getvalue())
    place = content.index(b"\xff\xc0")
    content[place + 5 : place + 9] = struct.pack(">HH", 65500, 65500)
    return bytes(content)


PIXELS = r"x\.png has more than 89,478,485 pixels"
BOMB = zlib.compress(bytes(200_000_000), 9)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (giant_png(100_000, 100_000), PIXELS),
        (giant_png(MAX_PIXELS + 1, 1), f"{PIXELS}|cannot be decoded"),
        (giant_png(2**31 - 1, 2**31 - 1), f"{PIXELS}|cannot be decoded"),
        (giant_jpeg(), f"{PIXELS}|cannot be decoded"),
        (png_with(b"zTXt", b"k\0\0" + BOMB), "cannot be decoded"),
        (png_with(b"iTXt", b"k\0\1\0\0\0" + BOMB), "cannot be decoded"),
        (b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0, 0, 0) + b";", f"{PIXELS}|cannot be decoded"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "cannot be decoded"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "cannot be decoded"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*decompression bomb")
def test_pictures_that_claim_too_much(content, message):
    with pytest.raises(UserError, match=message):
        decode(content, 3, "x.png", lambda: "x.png")


def test_bombs_in_chunks_of_a_png_take_no_memory(tmp_path):
    """Measured in a process of its own: either refused, or decoded without the chunk."""
    for kind in (b"iCCP", b"zTXt", b"iTXt"):
        (tmp_path / kind.decode()).write_bytes(png_with(kind, b"k\0" + b"\1\0\0" * (kind == b"iTXt") + b"\0" + BOMB))
    program = (
        "import resource, sys; from data.image_base import decode; from data.faults import BadSample\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "for path in sys.argv[1:]:\n"
        "    try: decode(open(path, 'rb').read(), 3, 'x', lambda: 'x')\n"
        "    except BadSample: pass\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    command = [sys.executable, "-c", program, *map(str, tmp_path.iterdir())]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=600)
    assert int(result.stdout) < 60_000  # kB


def test_a_jpeg_of_many_scans():
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64)).save(buffer, "JPEG", progressive=True)
    content = buffer.getvalue()
    assert decode(content, 3, "x", lambda: "x").shape == (3, 64, 64)
    first = content.index(b"\xff\xda")
    scan = content[first : content.index(b"\xff\xda", first + 2)]
    with pytest.raises(UserError, match=f"more than {MAX_SCANS} scans"):
        decode(content[:first] + scan * MAX_SCANS + content[first:], 3, "x", lambda: "x")


def test_of_an_animated_gif_the_first_frame_alone_is_decoded():
    frames = [Image.fromarray(picture(n, 30, 40).permute(1, 2, 0).numpy()).quantize(64) for n in range(3)]
    buffer = io.BytesIO()
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:])
    expected = torch.from_numpy(np.array(frames[0].convert("RGB"))).permute(2, 0, 1)
    assert torch.equal(decode(buffer.getvalue(), 3, "x", lambda: "x"), expected)
    assert decode(buffer.getvalue(), 1, "x", lambda: "x").shape == (1, 30, 40)


def test_sixteen_bits_become_eight():
    values = np.linspace(0, 65535, 400).astype(np.uint16).reshape(20, 20)
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "PNG")
    pixels = decode(buffer.getvalue(), 1, "x", lambda: "x")
    assert pixels.dtype == torch.uint8
    assert (pixels[0].double() - torch.from_numpy(values / 257.0)).abs().max() <= 1


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF"])
def test_damaged_pictures_end_in_a_sentence_and_not_in_the_end_of_the_process(kind):
    """In a process of its own: torchvision's PNG decoder dies of every second one."""
    buffer = io.BytesIO()
    Image.fromarray(picture(0, 40, 56).permute(1, 2, 0).numpy()).save(buffer, kind)
    child = os.fork()
    if not child:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # libjpeg comments on what it meets
        draw, bad = random.Random(kind), 0
        for _ in range(300):
            try:
                decode(damage(buffer.getvalue(), draw), 3, "x", lambda: "x")
            except UserError:
                bad += 1
        os._exit(0 if bad > 100 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_folders_whose_links_go_in_circles(tmp_path):
    write_pictures(tmp_path / "set/cat", 12)
    write_pictures(tmp_path / "set/dog", 12)
    for folder in ("cat", "dog"):
        for number in range(3):  # 6 ^ 40 paths
            (tmp_path / "set" / folder / f"again{number}").symlink_to(tmp_path / "set")
    module = Images(str(tmp_path / "set"), image_size=16, batch_size=4)
    module.setup()
    assert module.train_samples + module.val_samples + module._size("test") == 24
    assert module.class_names == ["cat", "dog"]


def test_image_files_that_are_none(tmp_path):
    write_pictures(tmp_path / "set", 12)
    (tmp_path / "set/gone.png").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"gone\.png is empty or no file"):
        Images(str(tmp_path / "set")).setup()
    (tmp_path / "set/gone.png").unlink()
    os.mkfifo(tmp_path / "set/pipe.png")
    with pytest.raises(UserError, match=r"pipe\.png is empty or no file"):
        Images(str(tmp_path / "set")).setup()


def test_image_names_that_are_no_utf8(tmp_path):
    write_pictures(tmp_path / "set", 12)
    os.rename(os.fsencode(tmp_path / "set/3.JPG"), os.fsencode(tmp_path / "set") + b"/\xe9.jpg")
    module = Images(str(tmp_path / "set"), image_size=16, batch_size=4)
    module.setup()
    assert module.train_samples + module.val_samples + module._size("test") == 12
