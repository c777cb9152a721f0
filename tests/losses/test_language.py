"""The chunked next-token loss: the values and gradients of the whole one, a fraction of its memory."""

import pytest
import torch

from moa_lightning import FFNConfig, UserError
from moa_lightning.losses.language import chunked_losses
from moa_lightning.models import GPTConfig
from tasks import LanguageModeling
from tests.layers import bytes_of, saved_tensors

B, T, DIM, VOCAB = 2, 7, 5, 33


def problem() -> tuple[torch.Tensor, torch.nn.Linear, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(B, T, DIM, generator=generator, dtype=torch.float64, requires_grad=True)
    head = torch.nn.Linear(DIM, VOCAB, bias=False, dtype=torch.float64)
    with torch.no_grad():
        head.weight.copy_(torch.randn(VOCAB, DIM, generator=generator))
    targets = torch.randint(0, VOCAB, (B, T), generator=generator)
    targets[0, 2] = targets[1, 6] = -100
    return x, head, targets


@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
def test_values_and_gradients_are_those_of_the_formula(chunk: int) -> None:
    x, head, targets = problem()
    nll, normalizer = chunked_losses(x, head, targets, chunk)
    weight = torch.randn(2, B, T, generator=torch.Generator().manual_seed(1))
    ours = torch.autograd.grad((nll * weight[0]).sum() + (normalizer * weight[1]).sum(), (x, head.weight))
    p = (x @ head.weight.T).exp()
    counted = (targets >= 0).double()
    total = p.sum(-1).log() * counted
    chosen = (x @ head.weight.T).gather(-1, targets.clamp(min=0)[..., None])[..., 0] * counted
    torch.testing.assert_close(nll.double(), total - chosen, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(normalizer.double(), total, rtol=1e-5, atol=1e-6)
    theirs = torch.autograd.grad(((total - chosen) * weight[0]).sum() + (total * weight[1]).sum(), (x, head.weight))
    for first, second in zip(ours, theirs, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)


def test_no_logits_are_kept_for_the_backward_pass() -> None:
    x, head, targets = torch.randn(4, 64, 8, requires_grad=True), torch.nn.Linear(8, 1000), torch.zeros(4, 64).long()
    with saved_tensors() as saved:
        chunked_losses(x, head, targets, 32)
    assert bytes_of(*saved) < 4 * 64 * 1000 * 4 / 5


def test_the_task_learns_the_same_with_chunks() -> None:
    batch = {"tokens": torch.randint(0, 11, (3, 8)), "targets": torch.randint(0, 11, (3, 8))}
    found = []
    for chunk in (None, 5):
        task = LanguageModeling(
            GPTConfig(1, 16, 2),
            FFNConfig(),
            vocab_size=11,
            context_length=8,
            seed=0,
            loss_chunk=chunk,
            z_loss_weight=0.1,
        )
        task.configure_model()
        task.log = lambda *args, **kwargs: None
        loss = task.training_step(batch, 0)
        loss.backward()
        found.append((loss.detach(), task.net.head.weight.grad, task.net.embed.weight.grad))
    logits = task.net(batch["tokens"])
    nll = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten())
    torch.testing.assert_close(found[0][0], (nll + 0.1 * logits.logsumexp(-1).square().mean()).detach())
    for first, second in zip(*found, strict=True):
        torch.testing.assert_close(first, second)


@pytest.mark.parametrize("options", [{"loss_chunk": 0}, {"z_loss_weight": -1.0}])
def test_impossible_settings_are_refused_by_name(options: dict) -> None:
    with pytest.raises(UserError, match=next(iter(options))):
        LanguageModeling(GPTConfig(1, 16, 2), **options)
