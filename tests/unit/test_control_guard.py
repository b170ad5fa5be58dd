"""The guards of the loss."""

import math
import random

from elastic.control.guard import MIN_STEPS, LossWatch, why_not_finite


def test_a_step_is_finite_if_its_loss_and_its_gradient_are() -> None:
    assert why_not_finite(1.0, 2.0) is None
    assert "loss is nan" in (why_not_finite(math.nan, 2.0) or "")
    assert "norm inf" in (why_not_finite(1.0, math.inf) or "")


def test_a_jump_of_the_loss_is_told_and_its_usual_noise_and_its_fall_are_not() -> None:
    noise, watch = random.Random(3), LossWatch()
    losses = [5.0 * 0.995**step + noise.gauss(0.0, 0.1) for step in range(500)]
    assert [watch.look(loss) for loss in losses] == [None] * 500
    usual = watch.look(4.0)
    assert usual is not None and abs(usual - losses[-1]) < 0.5


def test_nothing_is_a_jump_before_it_is_known_how_much_the_loss_moves() -> None:
    watch = LossWatch()
    assert [watch.look(1.0) for _ in range(MIN_STEPS - 1)] == [None] * (MIN_STEPS - 1)
    assert watch.look(100.0) is None
