"""Resharding: one checkpoint into another layout, type or format, proved tensor by tensor."""

from prefect import flow

from tasks.convert import ConversionOrder, convert, report_conversion


@flow(name="resharding")
def resharding(order: ConversionOrder) -> None:
    """Convert a checkpoint, and show how each of its tensors was proved.

    Args:
        order: What is to be converted into what.
    """
    report_conversion(convert(order))
