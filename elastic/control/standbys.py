"""How many standbys are worth their keep. Pure."""

# A day's, of Llama 3's machines: 419 failures of 2,048 in 54 days (Grattafiori et al. 2024, 3.3.4).
LOSS_PROBABILITY = 0.004
CONFIDENCE = 0.99


def num_standbys(
    workers: int, *, loss_probability: float = LOSS_PROBABILITY, confidence: float = CONFIDENCE
) -> int:
    """Count the standbys that suffice with this confidence while lost ones are being replaced.

    Each worker is lost with `loss_probability` meanwhile, on its own: the count is a quantile of the binomial
    distribution, as in ByteRobust (Wan et al. 2025, section 6). The default probability is a day's.
    """
    probability = (1.0 - loss_probability) ** workers
    covered, count = probability, 0
    while covered < confidence and count < workers:
        probability *= (workers - count) / (count + 1) * loss_probability / (1.0 - loss_probability)
        count += 1
        covered += probability
    return count
