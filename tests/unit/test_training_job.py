"""Jobs by their import path: each mistake gets one error that names it; the shipped jobs learn."""

from dataclasses import dataclass

import pytest
import torch

from elastic.errors import JobRejected
from elastic.training.evaluation import build_model, evaluate
from elastic.training.gpt import GPT, GPTJob, GPTSettings
from elastic.training.job import Split, load_job, load_settings
from elastic.training.randomness import keyed, mix, seed_for
from elastic.training.state import weights_sha256

CPU = torch.device("cpu")
HERE = "tests.unit.test_training_job"


class Half:
    """A job that lacks most of itself."""

    settings = GPTSettings

    def model(self, settings: GPTSettings) -> GPT:
        return GPT(settings)


class Untyped(GPTJob):
    """A job whose settings are no type."""

    settings = None  # type: ignore[assignment]


@dataclass
class Numbers:
    """Settings as a dataclass."""

    width: int = 3


class Plain(GPTJob):
    """A job with such settings."""

    settings = Numbers  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("path", "complaint"),
    [
        ("nowhere", "package.module:Class"),
        ("no.such.module:Job", "does not import: ModuleNotFoundError"),
        ("elastic.training.gpt:Missing", "has no class Missing"),
        (f"{HERE}:Half", r"lacks the method optimizer\(\)"),
        (f"{HERE}:Untyped", "lacks `settings`"),
    ],
)
def test_a_job_that_cannot_be_used_is_refused_with_its_reason(path, complaint):
    with pytest.raises(JobRejected, match=complaint):
        load_job(path)


@pytest.mark.parametrize(
    ("job", "given", "complaint"),
    [
        (GPTJob(), {"widht": 3}, r"job\.settings\.widht is no setting of GPTJob; it has: dropout, .*width"),
        (GPTJob(), {"width": 1}, r"job\.settings\.width: .*greater than or equal to 8 \(given: 1\)"),
        (GPTJob(), {"width": 300, "num_heads": 7}, "does not divide width = 300"),
        (Plain(), {"width": "many"}, r"job\.settings\.width: .*integer"),
        (Plain(), {"depth": 1}, "it has: width"),
    ],
)
def test_wrong_settings_are_refused_field_by_field(job, given, complaint):
    with pytest.raises(JobRejected, match=complaint):
        load_settings(job, given)


def test_settings_may_be_a_pydantic_model_or_a_dataclass():
    assert load_settings(GPTJob(), {"dropout": 0.5}) == GPTSettings(dropout=0.5)
    assert load_settings(Plain(), {"width": 7}) == Numbers(7)


def test_the_default_gpt_has_five_to_six_million_parameters():
    model = GPT(GPTSettings())
    assert 5_000_000 <= sum(parameter.numel() for parameter in model.parameters()) <= 6_000_000


def test_random_numbers_depend_on_the_key_alone_and_leave_no_trace():
    outside = torch.random.get_rng_state()
    draws: dict[int, tuple[list[float], list[float]]] = {}
    for key in (1, 2, 1):
        with keyed(key, CPU) as rng:
            drawn = torch.rand(3).tolist(), torch.rand(3, generator=rng).tolist()
        assert draws.setdefault(key, drawn) == drawn
    assert draws[1] != draws[2]
    own = torch.rand(3, generator=torch.Generator().manual_seed(1)).tolist()
    assert len({str(each) for each in (own, *draws[1])}) == 3, "the three streams of a key are different"
    assert torch.equal(torch.random.get_rng_state(), outside)
    assert (
        len({seed_for(seed, step, v) for seed in range(20) for step in range(20) for v in range(20)}) == 8000
    )
    assert all(0 <= seed_for(seed, -1, -1) < 1 << 63 for seed in range(100))
    assert mix(1, 2) != mix(2, 1)


def test_micro_batches_depend_on_step_and_virtual_rank_and_targets_follow_inputs(tmp_path):
    (tmp_path / "text").write_bytes(bytes(range(256)) * 100)
    settings = GPTSettings(sequence=16)
    job = GPTJob()
    split = Split(name="train", source=str(tmp_path / "text"), seed=1, micro_batch=3, settings=settings)
    dataset = job.dataset(split)
    batch = job.batch(dataset, 4, 2)
    assert (batch.shape, batch.dtype) == ((3, 17), torch.int64)
    assert torch.equal(batch[:, 1:], (batch[:, :-1] + 1) % 256)
    assert torch.equal(batch, job.batch(dataset, 4, 2))
    assert not torch.equal(batch, job.batch(dataset, 5, 2))
    assert not torch.equal(batch, job.batch(dataset, 4, 1))


def test_text_shorter_than_a_sample_is_refused(tmp_path):
    (tmp_path / "text").write_bytes(b"short")
    split = Split(
        name="validation", source=str(tmp_path / "text"), seed=1, micro_batch=1, settings=GPTSettings()
    )
    with pytest.raises(JobRejected, match="one sample needs 129"):
        GPTJob().dataset(split)


def test_an_untrained_gpt_scores_like_chance_and_the_same_bits_each_time(tmp_path):
    (tmp_path / "text").write_bytes(bytes(range(256)) * 100)
    path, settings = (
        "elastic.training.gpt:GPTJob",
        {"width": 16, "num_heads": 2, "num_layers": 1, "sequence": 16},
    )
    model = build_model(path, settings)
    scores = [
        evaluate(
            path,
            settings,
            {"model": model.state_dict()},
            source=str(tmp_path / "text"),
            seed=0,
            num_batches=2,
        )
        for _ in range(2)
    ]
    assert scores[0] == scores[1]
    assert scores[0].loss == pytest.approx(5.545, abs=0.01)
    assert scores[0].unigram == pytest.approx(5.545, abs=0.01)
    assert scores[0].num_tokens == 2 * 16 * 16


def test_equal_weights_have_equal_hashes_and_shared_ones_count_once():
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 3)
    twin = torch.nn.Linear(3, 3)
    assert weights_sha256(model) != weights_sha256(twin)
    twin.load_state_dict(model.state_dict())
    assert weights_sha256(model) == weights_sha256(twin)
    with torch.no_grad():
        twin.bias[0] = -twin.bias[0]
    assert weights_sha256(model) != weights_sha256(twin)
