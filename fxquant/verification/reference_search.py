"""Slow reference of scale searches: each scale is tried on all rows, and each row keeps its best.

It shares no arithmetic with `fxquant.kernels`. A form gives, for scales s [n] of the rows, their errors float64 [n],
scales that fit their codes, and the codes.
"""

import torch
from torch import Tensor

from fxquant.errors import InternalError
from fxquant.schemes.schemes import Recipe, WeightAlgorithm

LANES = 32
NUMBERS = 1 << 16
"""Numbers at a time: float64 temporaries of so many stay in a processor's cache."""
CodesAndScales = tuple[Tensor, Tensor, Tensor]
"""Codes [n, k], scales [n], second scales [n, G]."""


def searched_codes(recipe: Recipe, weight: Tensor) -> CodesAndScales:
    """Codes, scales and second scales of a weight [n, k], by an algorithm of `SEARCHES`.

    Raises InternalError for any other.
    """
    if recipe.algorithm.scales not in SEARCHES:
        raise InternalError(recipe.module, f"no reference for weights by {recipe.algorithm}")
    blocks = [_searched(recipe, rows.float()) for rows in weight.split(max(1, NUMBERS // weight.shape[1]))]
    codes, scales, seconds = (torch.cat(column) for column in zip(*blocks, strict=True))
    return codes, scales, seconds


def _searched(recipe: Recipe, rows: Tensor) -> CodesAndScales:
    form = _TwoLevel(rows, recipe.group_size) if recipe.int4 and recipe.group_size else _Channel(rows, recipe)
    return form.codes(SEARCHES[recipe.algorithm.scales](form))


def _clip(form: "_Channel | _TwoLevel") -> Tensor:
    """The best scale of the grid."""
    return _grid(form)[0]


def _grid(form: "_Channel | _TwoLevel") -> tuple[Tensor, Tensor, Tensor]:
    """The best scales of the grid, their errors and places."""
    scales, errors, places = form.widest, form.error(form.widest), torch.zeros(len(form.rows), dtype=torch.int64)
    for place in range(1, form.grid):
        tried = form.on_grid(torch.full((len(form.rows),), place))
        error = form.error(tried)
        better = (tried > 0) & (error < errors)
        scales, errors = torch.where(better, tried, scales), torch.where(better, error, errors)
        places = torch.where(better, place, places)
    return scales, errors, places


def _least_squares(form: "_Channel | _TwoLevel") -> Tensor:
    """The best scale of iterations that start at the grid's first scale, at its best, and at the neighbors of that."""
    scales, errors, places = _grid(form)
    for start in (torch.zeros_like(places), places - 1, places, places + 1):
        # outside the grid: repeats a start, no harm
        rows, some, tried = torch.arange(len(places)), form, form.on_grid(start.clamp(0, form.grid - 1))
        for _ in range(form.rounds):
            fit = some.fit(tried)
            moves = (fit > 0) & (tried > 0) & (fit != tried)  # where it stays once, it stays
            if not moves.any():
                break
            if not moves.all():
                rows, some, fit = rows[moves], some.of_rows(moves), fit[moves]
            tried, error = fit, some.error(fit)
            better = error < errors[rows]
            scales[rows[better]], errors[rows[better]] = tried[better], error[better]
    return scales


SEARCHES = {WeightAlgorithm.CLIP: _clip, WeightAlgorithm.LEAST_SQUARES: _least_squares}
"""Algorithm that chooses scales → the scales [n] that it finds for a form."""


def highest_code(recipe: Recipe) -> int:
    """The largest code: 7 of four bits, 127 of eight."""
    bits = recipe.scheme.weight_bits
    if bits is None:
        raise InternalError(recipe.module, f"{recipe.scheme} has no integer codes")
    return 2 ** (bits - 1) - 1


class _Channel:
    """One scale per row, representable in the recipe's dtype."""

    grid, rounds = 40, 20

    def __init__(self, rows: Tensor, recipe: Recipe) -> None:
        self.rows, self.exact, self.recipe = rows, rows.double(), recipe
        self.high = highest_code(recipe)
        self.widest = self.of(rows.abs().amax(1))

    def of_rows(self, chosen: Tensor) -> "_Channel":
        return _Channel(self.rows[chosen], self.recipe)

    def of(self, magnitude: Tensor) -> Tensor:
        """Scales whose highest code stands for these magnitudes [n]."""
        return self._rounded(magnitude / self.high)

    def on_grid(self, place: Tensor) -> Tensor:
        return self._rounded(self.widest * ((64 - place).float() / 64))

    def error(self, scale: Tensor) -> Tensor:
        q = self._quotients(scale)
        return _lane_sum(_squared(q.double().mul_(scale.double().unsqueeze(1)).sub_(self.exact)))

    def fit(self, scale: Tensor) -> Tensor:
        q = self._quotients(scale).double()
        return self._rounded(_quotient(_lane_sum(self.exact * q), _lane_sum(q * q)))

    def codes(self, scale: Tensor) -> CodesAndScales:
        return self._quotients(scale), scale, torch.ones(len(scale), 1)

    def _rounded(self, scale: Tensor) -> Tensor:
        return scale.to(self.recipe.scale_dtype).float()

    def _quotients(self, scale: Tensor) -> Tensor:
        divisor = torch.where(scale > 0, scale, 1).unsqueeze(1)
        return torch.div(self.rows, divisor).round_().clamp_(-self.high - 1, self.high)


class _TwoLevel:
    """An integer second scale per group, chosen again for every first-level scale."""

    grid, rounds = 8, 6

    def __init__(self, rows: Tensor, group_size: int) -> None:
        self.rows, self.groups = rows, rows.unflatten(1, (-1, group_size))
        self.exact, self.peaks = self.groups.double(), self.groups.abs().amax(-1)
        self.widest = self.of(rows.abs().amax(1))
        self.last: tuple[Tensor, tuple[Tensor, Tensor]] | None = None

    def of_rows(self, chosen: Tensor) -> "_TwoLevel":
        return _TwoLevel(self.rows[chosen], self.groups.shape[-1])

    def of(self, magnitude: Tensor) -> Tensor:
        """First-level scales whose largest product of code and second scale stands for these magnitudes [n]."""
        return magnitude / 119

    def on_grid(self, place: Tensor) -> Tensor:
        return self.widest * ((24 - place).float() / 24)

    def error(self, scale: Tensor) -> Tensor:
        return self._seconds(scale)[1]

    def fit(self, scale: Tensor) -> Tensor:
        seconds = self._seconds(scale)[0]
        q, factors = self._quotients(scale, seconds).double(), seconds.double()
        dots = _in_order(factors * _lane_sum(self.exact * q))
        return _quotient(dots, _in_order(factors * factors * _lane_sum(q * q))).float()

    def codes(self, scale: Tensor) -> CodesAndScales:
        seconds = self._seconds(scale)[0]
        return self._quotients(scale, seconds).flatten(1), scale, seconds

    def _seconds(self, scale: Tensor) -> tuple[Tensor, Tensor]:
        """As `_chosen`; a scale that was fitted is asked for its error and then for a better one."""
        if self.last is None or self.last[0] is not scale:
            self.last = scale, self._chosen(scale)
        return self.last[1]

    def _chosen(self, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Per group, the best of 1 … 17 that clips no weight to less than half, ties to the larger; and the errors of
        the rows."""
        needed = torch.ceil(self.peaks / (7 * torch.where(scale > 0, scale, 1)).unsqueeze(1))
        widest = needed.clamp(1, 17)
        best, least = torch.ones_like(widest), torch.full_like(widest, torch.inf, dtype=torch.float64)
        for second in range(17, 0, -1):
            tried = (second <= widest) & (2 * second >= widest) & (scale > 0).unsqueeze(1)
            if not tried.any():
                continue
            q = self._quotients(scale, torch.full_like(widest[:, :1], second)).double()
            steps = (scale.double().unsqueeze(1) * second).unsqueeze(-1)
            error = _lane_sum(_squared(q.mul_(steps).sub_(self.exact)))
            better = tried & (error < least)
            best, least = torch.where(better, second, best), torch.where(better, error, least)
        return best, _in_order(least)

    def _quotients(self, scale: Tensor, seconds: Tensor) -> Tensor:
        """Codes whose products with the second scales stay within 119."""
        lowest = -torch.floor(119 / seconds).clamp(max=8).unsqueeze(-1)
        steps = (torch.where(scale > 0, scale, 1).unsqueeze(1) * seconds).unsqueeze(-1)
        q = torch.div(self.groups, steps).round_()
        return torch.maximum(q, lowest, out=q).clamp_(max=7)


def _quotient(dots: Tensor, norms: Tensor) -> Tensor:
    """float32; 0 where all codes are."""
    return torch.where(norms > 0, dots / torch.where(norms > 0, norms, 1), 0).float()


def _in_order(values: Tensor) -> Tensor:
    """float64 [n, G] → [n], added from left to right."""
    return _running(values.unbind(1))


def _running(values: tuple[Tensor, ...]) -> Tensor:
    total = torch.zeros_like(values[0])
    for value in values:
        total += value
    return total


def _squared(values: Tensor) -> Tensor:
    """In place."""
    return values.mul_(values)


def _lane_sum(terms: Tensor) -> Tensor:
    """float64 [..., k] → [...]: column j into lane j mod 32, in order; then the upper half of the lanes onto the lower,
    until one is left."""
    # the order of the kernels, so that the same scales win on both sides
    beyond = -terms.shape[-1] % LANES
    padded = torch.nn.functional.pad(terms, (0, beyond)) if beyond else terms
    lanes = _running(padded.unflatten(-1, (-1, LANES)).unbind(-2))
    while lanes.shape[-1] > 1:
        lower, upper = lanes.chunk(2, -1)
        lanes = lower + upper
    return lanes.squeeze(-1)
