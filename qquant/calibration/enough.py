"""Whether calibration text is enough for a model, by its widest linear. Needs no torch."""

from __future__ import annotations


def check_enough(tokens: int, widest_in_features: int) -> str | None:
    """What to tell a user whose calibration is small for the model, or None.

    A linear with d inputs has a d × d Hessian; from n tokens its rank is at most n, so with n < d
    whole directions of the input are unseen and only damping decides what happens to weights there.
    Above that it is invertible but noisy: of n independent samples of d features the eigenvalues
    scatter by (1 ± √(d/n))² (Marchenko and Pastur) and a least-squares fit, which is what GPTQ's
    update is, does 1/(1 − d/n) worse on new text than it could. At n = 4 d that is a spread of 0.25
    to 2.25 and a third; text is more correlated than independent draws, so four is a floor and no
    luxury.

    Args:
        tokens: calibration tokens in all, samples × seqlen.
        widest_in_features: of the linears to be quantized (the MLP's output projection, as a rule).
    """
    wanted = 4 * widest_in_features
    if tokens >= wanted:
        return None
    if tokens < widest_in_features:
        return (
            f"Too little calibration data: {tokens:,} tokens cannot fill the widest Hessian "
            f"({widest_in_features:,} inputs), which is then rank-deficient and the result a "
            f"matter of damping. Use at least {widest_in_features:,} tokens, better {wanted:,} "
            f"(samples times seqlen; raise --samples)."
        )
    return (
        f"Little calibration data: {tokens:,} tokens are {tokens / widest_in_features:.1f} per "
        f"input of the widest linear ({widest_in_features:,} inputs), so its Hessian is noisy. "
        f"{wanted:,} tokens (4 per input; raise --samples) would do."
    )
