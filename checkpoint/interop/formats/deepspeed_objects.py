"""Objects of DeepSpeed's that its engines take over from files: named as they are there, never imported."""


class LossScaler:
    """Stands for the scaler of bf16 and fp32, which scales nothing."""

    def __init__(self) -> None:
        self.cur_scale = 1.0
        self.dynamic = False


NAMES = {LossScaler: "deepspeed.runtime.fp16.loss_scaler"}
