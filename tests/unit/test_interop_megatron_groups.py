"""The options of an optimizer's groups, as Megatron has them: its own, or others' that can be its own."""

import pytest

from checkpoint.errors import Unsupported
from checkpoint.interop.formats.contract import About
from checkpoint.interop.formats.known import open_foreign
from tests.foreign_samples import Given, contents_of, rewritten
from tests.unit.test_interop_megatron_dist import made


def test_an_optimizer_whose_options_nobody_knows_is_not_written(tmp_path):
    opened = open_foreign(str(made("llama", tmp_path)))
    tensors = contents_of(opened)
    with pytest.raises(Unsupported, match="options of its groups"):
        rewritten(Given(tensors, About("given", step=7)), "megatron-dist", tmp_path / "a")
    groups = [{"params": [], "lr": 0.5, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}]
    about = About("given", step=7, extra={"optimizer": {"param_groups": groups}})
    back = rewritten(Given(tensors, about), "megatron-dist", tmp_path / "b")
    said = back.about.extra["megatron_optimizer"]
    assert [(one["wd_mult"], one["weight_decay"], one["betas"]) for one in said] == [
        (1.0, 0.1, (0.9, 0.95)),
        (0.0, 0.0, (0.9, 0.95)),
    ]
    tensors["optimizer.step.output_layer.weight"] = tensors["optimizer.step.output_layer.weight"] + 1
    with pytest.raises(Unsupported, match=r"one step for all parameters, and there are \[7, 8\]"):
        rewritten(Given(tensors, about), "megatron-dist", tmp_path / "c")


def test_groups_that_decay_what_megatron_decays_are_its_own_and_others_are_refused(tmp_path):
    tensors = contents_of(open_foreign(str(made("llama", tmp_path))))
    weights = {name: one for name, one in tensors.items() if not name.startswith("optimizer.")}
    names = [[name for name, one in weights.items() if (one.dim() > 1) is decays] for decays in (True, False)]

    def about(decays: tuple[float, ...], members: list[list[str]]) -> About:
        same = {"lr": 0.5, "betas": (0.9, 0.95), "eps": 1e-8}
        groups = [
            {"params": each, **same, "weight_decay": one} for each, one in zip(members, decays, strict=True)
        ]
        return About("given", step=7, extra={"optimizer": {"param_groups": groups}})

    back = rewritten(Given(tensors, about((0.1, 0.0), names)), "megatron-dist", tmp_path / "a")
    said = back.about.extra["megatron_optimizer"]
    assert [(one["wd_mult"], one["weight_decay"], one["lr"]) for one in said] == [
        (1.0, 0.1, 0.5),
        (0.0, 0.0, 0.5),
    ]
    moved = [[*names[0], names[1][0]], names[1][1:]]
    for number, wrong in enumerate((about((0.1, 0.0), moved), about((0.0, 0.1), names))):
        with pytest.raises(Unsupported, match=r"weight decay, which it has for matrices alone"):
            rewritten(Given(tensors, wrong), "megatron-dist", tmp_path / f"no{number}")
