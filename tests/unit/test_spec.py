"""The specification: its defaults, its bounds, and one clear error for each mistake."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpoint import LatestN, Parity, Tier
from tasks.errors import SpecError
from tasks.loading import check_spec, describe_keys, known_keys, load_spec, read_spec
from tasks.order import to_order
from tasks.runs import Run
from tasks.spec import RunSpec, with_drill

REPOSITORY = Path(__file__).parents[2]


def test_the_defaults_are_a_valid_run_that_breaks_nothing():
    spec = load_spec(None)
    assert spec == RunSpec()
    assert spec.drill.faults == []


def test_every_key_has_a_description_and_a_default():
    for key, _default, _bounds, meaning in describe_keys():
        assert meaning, f"{key} has no description"
    assert RunSpec.model_validate({}) == RunSpec()


def test_the_first_run_is_the_defaults_and_a_drill():
    spec = load_spec(REPOSITORY / "examples" / "first_run.toml")
    assert len(spec.drill.faults) == 1
    assert spec.model_copy(update={"drill": RunSpec().drill}) == RunSpec()


def test_a_file_and_settings_add_up(tmp_path):
    path = tmp_path / "spec.toml"
    path.write_text("[training]\nsteps = 7\n[job]\n")
    spec = load_spec(path, ["world.workers=2", "job.settings.width=64", "data.source=/some/text"])
    assert (spec.training.steps, spec.world.workers, spec.data.source) == (7, 2, "/some/text")
    assert spec.job.settings == {"width": 64}


def test_a_value_that_is_no_toml_is_a_string():
    assert load_spec(None, ["data.source=s3://bucket/a b=c"]).data.source == "s3://bucket/a b=c"


def test_none_takes_an_optional_default_away():
    assert load_spec(None, ["training.grad_clip=none"]).training.grad_clip is None


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["training.step=3"], ["unknown key training.step", "did you mean training.steps?"]),
        (["steps=4"], ["unknown key steps", "training.steps"]),
        (["nonsense.xyzzy=1"], ["unknown key nonsense.xyzzy", "job, data, training"]),
        (["training.steps=4", "training.steps=5"], ["training.steps", "twice"]),
        (["job.settings.a=1", "job.settings={b=1}"], ["job.settings", "twice"]),
        (["training.steps"], ["section.key=value"]),
        (["training=4"], ["training", "dictionary"]),
        (["training.steps=0"], ["training.steps = 0", "greater than or equal to 1"]),
        (["training.steps=many"], ["training.steps = 'many'", "integer"]),
        (["training.bucket_mib=inf"], ["training.bucket_mib = inf", "finite"]),
        (["checkpoint.codec=lz4"], ["checkpoint.codec = 'lz4'", "'raw', 'zstd' or 'planes'"]),
        (["job.path=not-a-path"], ["job.path"]),
        (["drill.faults=[{at_stp=1}]"], ["drill.faults[0].at_step", "missing"]),
        (["drill.faults=[{at_step=1, rnk=1}]"], ["drill.faults[0].rnk", "at_step, kind, rank"]),
    ],
)
def test_a_mistake_gives_an_error_that_names_it(settings, words):
    with pytest.raises(SpecError) as caught:
        load_spec(None, settings)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        (["training.global_batch=10", "training.virtual_ranks=4"], "training.global_batch = 10"),
        (["training.global_batch=4"], "training.virtual_ranks = 8"),
        (["world.workers=9"], "world.workers = 9"),
        (["world.min_workers=5"], "world.min_workers = 5"),
        (["training.parameter_copies=1", "training.optimizer_copies=1"], "training.parameter_copies = 1"),
        (["training.parameter_copies=1", "training.determinism=fast"], "training.parameter_copies = 1"),
        (["training.parameter_copies=5"], "training.parameter_copies = 5"),
        (["checkpoint.parity_losses=1"], "checkpoint.parity_losses = 1"),
        (
            ["checkpoint.hold=1", "checkpoint.parity_losses=3", "checkpoint.parity_group=3"],
            "checkpoint.parity_losses = 3",
        ),
        (['checkpoint.tiers=[{url="s3://b/x"}, {url="s3://b/x"}]'], "checkpoint.tiers names one tier twice"),
        (["training.steps=9", "drill.faults=[{at_step=9}]"], "drill.faults[0].at_step = 9"),
        (["drill.faults=[{at_step=9, rank=4}]"], "drill.faults[0].rank = 4"),
    ],
)
def test_keys_that_do_not_go_together_are_named_with_a_remedy(settings, key):
    with pytest.raises(SpecError) as caught:
        load_spec(None, settings)
    assert str(caught.value).startswith(key)
    assert len(str(caught.value).splitlines()) == 1


def test_a_key_of_the_file_is_not_overridden_by_a_setting(tmp_path):
    path = tmp_path / "spec.toml"
    path.write_text("[training]\nsteps = 7\n")
    with pytest.raises(
        SpecError, match=r"training\.steps is set twice, in .*spec\.toml and by training\.steps=8"
    ):
        load_spec(path, ["training.steps=8"])


def test_an_unreadable_file_is_named(tmp_path):
    with pytest.raises(SpecError, match=r"missing\.toml"):
        load_spec(tmp_path / "missing.toml")
    broken = tmp_path / "broken.toml"
    broken.write_text("[training\n")
    with pytest.raises(SpecError, match=r"broken\.toml is not TOML"):
        load_spec(broken)


def test_unknown_keys_of_a_file_are_all_listed():
    with pytest.raises(SpecError) as caught:
        check_spec({"training": {"stepps": 1}, "wrld": {"workers": 2}})
    assert len(str(caught.value).splitlines()) == 2


def test_a_specification_survives_its_file(tmp_path):
    spec = load_spec(None, ["drill.faults=[{at_step=3}]", "job.settings.width=8", "checkpoint.keep_every=5"])
    path = tmp_path / "spec.json"
    path.write_text(spec.model_dump_json())
    assert read_spec(path) == spec


def test_a_damaged_specification_is_refused_by_name(tmp_path):
    path = tmp_path / "spec.json"
    path.write_text('{"training": {"steps": 0}}')
    with pytest.raises(SpecError, match=r"spec\.json"):
        read_spec(path)


def test_what_hosts_hold_protect_and_bring_further_reaches_the_order(tmp_path):
    settings = [
        "checkpoint.hold=2",
        "checkpoint.parity_losses=2",
        "checkpoint.parity_group=5",
        'checkpoint.tiers=[{url="s3://bucket/{run}", every_steps=40, keep_latest=2, name="far"}]',
        "checkpoint.delta_chain=3",
    ]
    order = to_order(Run("mine", tmp_path, load_spec(None, settings))).checkpoint
    assert (order.hold, order.parity, order.save.delta_chain) == (2, Parity(5, 2), 3)
    assert order.tiers == (Tier("s3://bucket/mine", 40, (LatestN(2),), "far"),)
    default = to_order(Run("mine", tmp_path, RunSpec())).checkpoint
    assert (default.hold, default.parity, default.tiers, default.save.delta_chain) == (0, None, (), 0)


def test_a_tier_that_is_the_run_s_own_store_is_refused_before_anything_starts(tmp_path):
    spec = load_spec(None, [f'checkpoint.tiers=[{{url="file://{tmp_path}/store/"}}]'])
    with pytest.raises(SpecError, match=r"checkpoint\.tiers: .*are the same place"):
        to_order(Run("mine", tmp_path, spec))


def test_a_drill_without_faults_gets_one_it_can_survive():
    assert len(with_drill(RunSpec()).drill.faults) == 1
    RunSpec.model_validate(with_drill(RunSpec()).model_dump())
    own = load_spec(None, ["drill.faults=[{at_step=3}]"])
    assert with_drill(own) == own


def test_the_form_forbids_unknown_keys_everywhere():
    schema = RunSpec.model_json_schema()
    models = [schema, *schema["$defs"].values()]
    assert all(model["additionalProperties"] is False for model in models if "properties" in model)
    json.dumps(schema)


@given(key=st.sampled_from(known_keys()), text=st.text(max_size=20))
def test_any_value_of_any_key_is_taken_or_refused_clearly(key, text):
    try:
        load_spec(None, [f"{key}={text}"])
    except SpecError as error:
        assert key.split(".")[0] in str(error)  # noqa: PT017 - hypothesis gives both kinds


@pytest.mark.parametrize(
    "settings",
    [
        ["data.source=https://user:hunter2@example.org/text"],
        ["checkpoint.store=s3://AKIA:hunter2@bucket/run"],
        ['checkpoint.tiers=[{url="s3://AKIA:hunter2@bucket/run"}]'],
        ["data.source=https://example.org/text?X-Amz-Signature=hunter2"],
    ],
)
def test_a_url_with_credentials_is_refused_without_repeating_them(settings):
    with pytest.raises(SpecError, match="carries credentials") as refused:
        load_spec(None, settings)
    assert "hunter2" not in str(refused.value)


def test_standbys_are_a_number_or_as_many_as_the_workers_need() -> None:
    assert load_spec(None, ["world.standbys=auto"]).world.standbys == "auto"
    assert load_spec(None, ["world.standbys=2"]).world.standbys == 2
    with pytest.raises(SpecError, match="standbys"):
        load_spec(None, ["world.standbys=-1"])
