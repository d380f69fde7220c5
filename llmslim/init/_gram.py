"""Gram matrices of a projection's inputs, and numerics that survive the bad ones.

A fit to outputs needs no activations, only their second moments: for a weight W and a block B

    E ‖W x - B x‖² = tr((W - B) H (W - B)ᵀ),   H = E[x xᵀ]

Real ones are awkward. Language models send a few tokens through with activations a thousand times
the others, some channels never fire, and there may be fewer tokens than channels. So enormous rows
are multiplied in float64, rows with a NaN are left out and counted, and a factorisation that fails
is tried again with more damping instead of giving up.

Shapes: I = in_features, O = out_features, T = tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

DAMPING = 0.1
"""Damping in units of the median channel's power; see `damping`.

Measured on tokens that the fit has not seen, 1e-5 to 0.1 differ by a few percent of the error, 0.1
being best; on text of another kind a fit damped less is worse.
"""

_ENORMOUS = 30.0
_BLOCK = 384
"""Columns of a Gram matrix worked out at once: wide enough for a fast product."""
_TRIES = 12
_TINY = 1e-300


def wide(values: Tensor) -> Tensor:
    """Return values in float32, or in float64 if that is what they are in: nothing is rounded."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


class GramAccumulator:
    """Sums x xᵀ, and y xᵀ where there are targets, over chunks of tokens.

    Products are float32, which is fast, or float64 where the tokens are, and sums float64. Rows of
    more than 30 times the median length of their chunk are multiplied in float64: beside them
    float32 would lose the others.

    Args:
        in_features: I.
        out_features: O of the targets, if `update` is given any.
        target_moments: sum y yᵀ as well, which tells the size of an error.
        device: where the sums are kept.

    Example:
        >>> gram = GramAccumulator(2)
        >>> gram.update(torch.tensor([[1.0, 2.0], [3.0, float("nan")]]))
        >>> gram.tokens, gram.skipped, gram.gram_II.tolist()
        (1, 1, [[1.0, 2.0], [2.0, 4.0]])
    """

    tokens: int
    """Tokens summed so far."""
    skipped: int
    """Tokens left out because a value was not finite."""

    def __init__(
        self,
        in_features: int,
        out_features: int | None = None,
        *,
        target_moments: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.float64, device=device)

        self.tokens = self.skipped = 0
        self._xx_II = zeros(in_features, in_features)
        self._yx_OI = None if out_features is None else zeros(out_features, in_features)
        self._yy_OO = None
        if target_moments:
            assert out_features is not None
            self._yy_OO = zeros(out_features, out_features)

    @property
    def gram_II(self) -> Tensor:  # noqa: N802  (a tensor, with its shape as every other)
        """E[x xᵀ], float64; zeros while nothing was seen."""
        return self._xx_II / max(self.tokens, 1)

    @property
    def cross_OI(self) -> Tensor | None:  # noqa: N802
        """E[y xᵀ], float64; None without targets."""
        return None if self._yx_OI is None else self._yx_OI / max(self.tokens, 1)

    @property
    def target_OO(self) -> Tensor | None:  # noqa: N802
        """E[y yᵀ], float64; None where they are not summed."""
        return None if self._yy_OO is None else self._yy_OO / max(self.tokens, 1)

    @torch.no_grad()
    def update(self, x: Tensor, y: Tensor | None = None) -> None:
        """Add a chunk of tokens.

        Args:
            x: inputs (..., I), any float type.
            y: targets (..., O) of the same leading shape, if `out_features` was given.
        """
        assert (y is None) == (self._yx_OI is None)
        x_TI = wide(x.reshape(-1, x.shape[-1]))
        y_TO = None
        if y is not None:
            y_TO = wide(y.reshape(-1, y.shape[-1]))
            both = torch.promote_types(x_TI.dtype, y_TO.dtype)
            x_TI, y_TO = x_TI.to(both), y_TO.to(both)
        # Lengths in float64: that of a finite row must not overflow.
        length_T = torch.linalg.vector_norm(x_TI, dim=1, dtype=torch.float64)
        finite_T = length_T.isfinite()
        if y_TO is not None:
            finite_T &= torch.linalg.vector_norm(y_TO, dim=1, dtype=torch.float64).isfinite()
        tokens = int(finite_T.sum())
        self.tokens += tokens
        self.skipped += len(finite_T) - tokens
        if tokens == 0:
            return
        enormous_T = finite_T & (length_T > _ENORMOUS * length_T[finite_T].median())
        usual_T = finite_T & ~enormous_T
        if usual_T.all():
            self._add(x_TI, y_TO)
            return
        if usual_T.any():  # zeros add nothing, and cost less than picking out the other rows
            usual_T1 = usual_T[:, None]
            self._add(x_TI.where(usual_T1, 0), None if y_TO is None else y_TO.where(usual_T1, 0))
        if enormous_T.any():
            y_RO = None if y_TO is None else y_TO[enormous_T].double()
            self._add(x_TI[enormous_T].double(), y_RO)

    def _add(self, x_TI: Tensor, y_TO: Tensor | None) -> None:
        _add_gram(self._xx_II, x_TI)
        if y_TO is not None:
            assert self._yx_OI is not None
            self._yx_OI += y_TO.t() @ x_TI
            if self._yy_OO is not None:
                _add_gram(self._yy_OO, y_TO)


def _add_gram(sum_II: Tensor, x_TI: Tensor) -> None:
    """Add xᵀ x, working out the blocks below the diagonal only: they are those above it, turned."""
    start = 0
    for part_TB in x_TI.split(_BLOCK, dim=1):
        stop = start + part_TB.shape[1]
        rows_BI = part_TB.t() @ x_TI[:, :stop]
        sum_II[start:stop, :stop] += rows_BI
        sum_II[:start, start:stop] += rows_BI[:, :start].t()
        start = stop


def damping(gram_II: Tensor, relative: float = DAMPING) -> Tensor:
    """Return what to add to a Gram matrix's diagonal, (I,), float64; never zero.

    The unit is the median power of the channels that fire, so that an enormous one does not damp
    all others away, plus a rounding-sized share of each channel's own power.

    Args:
        gram_II: Gram matrix.
        relative: damping in that unit.
    """
    power_I = torch.nan_to_num(gram_II.diagonal().double(), posinf=0.0).clamp_min(0)
    fires_I = power_I > 0
    unit = power_I[fires_I].median() if fires_I.any() else power_I.new_ones(())
    return relative * unit + 1e-10 * power_I + _TINY


def stable_cholesky(gram_II: Tensor, relative: float = DAMPING) -> tuple[Tensor, Tensor]:
    """Factor a damped Gram matrix, whatever it is: rank deficient, zero, or with a NaN in it.

    Args:
        gram_II: Gram matrix, any float type.
        relative: first damping, see `damping`; ten times that where the factor does not exist.

    Returns:
        The lower factor of H + diag(λ), (I, I), and λ, (I,); float64.
    """
    # In place where it can be: at the widths of a large MLP, each copy is gigabytes.
    gram_II = torch.nan_to_num(gram_II.double(), posinf=0.0, neginf=0.0)
    gram_II = (gram_II + gram_II.t()).div_(2)
    for attempt in range(_TRIES):
        lambda_I = damping(gram_II, relative * 10**attempt)
        damped_I = gram_II.diagonal() + lambda_I
        # To a unit diagonal first: channels may differ by many orders of magnitude.
        scale_I = damped_I.clamp_min(_TINY).rsqrt()
        scaled_II = (gram_II * scale_I[:, None]).mul_(scale_I)
        scaled_II.diagonal().copy_(damped_I * scale_I * scale_I)
        factor_II, info = torch.linalg.cholesky_ex(scaled_II)
        if info == 0 and factor_II.sum().isfinite():
            return factor_II.div_(scale_I[:, None]), lambda_I
    lambda_I = gram_II.abs().sum(1) + 1.0  # dominant, so always positive definite
    return torch.linalg.cholesky(gram_II + lambda_I.diag()), lambda_I


def equivalent_target(
    cross_OI: Tensor, gram_II: Tensor, weight_OI: Tensor, relative: float = DAMPING
) -> Tensor:
    """Return the weight that stands for targets from another stream: (C + W λ)(H + λ)⁻¹.

    For every block B, E‖y - B x‖² is E‖(W* - B) x‖² plus what no matrix can reach, so a fit that is
    nearest to a weight serves any targets y.

    Args:
        cross_OI: C = E[y xᵀ] with y the wanted outputs and x the inputs there will be.
        gram_II: H = E[x xᵀ].
        weight_OI: the dense weight; damping pulls towards it.
        relative: see `damping`.
    """
    factor_II, lambda_I = stable_cholesky(gram_II, relative)
    wanted_OI = torch.nan_to_num(cross_OI.double(), posinf=0.0, neginf=0.0)
    wanted_OI.add_(weight_OI.double() * lambda_I)
    return torch.cholesky_solve(wanted_OI.t(), factor_II).t()


def output_power(weight_OI: Tensor, gram_II: Tensor) -> float:
    """Return E‖W x‖², float64 throughout.

    Args:
        weight_OI: W.
        gram_II: E[x xᵀ].
    """
    weight_OI = weight_OI.double()
    return float((weight_OI @ gram_II.double() * weight_OI).sum())


def relative_error(block_OI: Tensor, weight_OI: Tensor, gram_II: Tensor) -> float:
    """Return E‖(W - B) x‖² / E‖W x‖², 0 where the dense outputs are all 0.

    Args:
        block_OI: B.
        weight_OI: W.
        gram_II: E[x xᵀ].
    """
    power = output_power(weight_OI, gram_II)
    error = output_power(weight_OI.double() - block_OI.double(), gram_II)
    return max(error, 0.0) / power if power > 0 else 0.0
