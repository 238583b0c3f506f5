"""The vector work of Krylov solvers, on k rows at once: linear combinations with their squared norms, dot products, and
whole steps of conjugate gradients and of MINRES.

Every row is a system of its own with its own coefficients, which stay on the device, as do the sums.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from auxfast._native import use_native

LINEAR_COMBINATION_SCHEMA = "linear_combination_(Tensor(a!) out, Tensor[] terms, Tensor coefficients) -> Tensor"
ROW_DOTS_SCHEMA = "row_dots(Tensor a, Tensor b) -> Tensor"
CONJUGATE_GRADIENT_STEP_SCHEMA = (
    "conjugate_gradient_step_(Tensor(a!) x, Tensor(b!) best, Tensor(c!) r, Tensor(d!) p, Tensor? z, Tensor product, "
    "Tensor(e!) numbers, int part) -> ()"
)
MINRES_STEP_SCHEMA = (
    "minres_step_(Tensor(a!) x, Tensor w, Tensor(b!) w_old, Tensor(c!) v, Tensor u, Tensor u_old, Tensor(d!) r, "
    "Tensor? z, Tensor(e!) product, Tensor(f!) numbers, int part) -> ()"
)

RUNNING, REACHED, SINGULAR, CURVED, BROKEN = range(5)
"""Status of a row: whether it goes on, or why it has stopped. REACHED: its residual is within the tolerance. SINGULAR:
a null vector was met. CURVED: negative curvature, which ends conjugate gradients. BROKEN: something was not finite, or
a preconditioner is not positive definite."""

WHOLE, BEFORE_PRECONDITIONER, AFTER_PRECONDITIONER = range(3)
"""Parts of a step."""

_SHARED = (
    "status",
    "negative",  # 1 once negative curvature was met
    "asymmetry",  # |<v, H w> - <w, H v>| for unit vectors of the first two steps, relative to `largest`; NaN before
    "noise",  # the sum of squares of such figures, of all steps that follow each other
    "largest",  # curvature seen, at most |H|
    "tolerance",  # norm of the residual to stop at
    "square",  # of the norm of the residual of x
    "steps",  # taken
    "moves",  # 1 while the row is updated in this step
)
_CONJUGATE_GRADIENT = (
    *_SHARED,
    "rz",  # r . z
    "pp",  # p . p
    "pp_before",
    "alpha",
    "beta",
    "beta_by_alpha",
    "best_square",  # of the norm of the residual of `best`
    "leaves",  # 1 where this step leaves the best iterate so far
)
_MINRES = (
    *_SHARED,
    *("alfa", "beta", "beta_ratio", "phibar", "phibar_before", "c", "s", "dbar"),
    *("epsilon", "epsilon_before", "delta", "gamma", "phi"),
)
CONJUGATE_GRADIENT_NUMBERS = {name: i for i, name in enumerate(_CONJUGATE_GRADIENT)}
"""Rows of the numbers of conjugate gradients, by name; the first nine are those of MINRES too."""
MINRES_NUMBERS = {name: i for i, name in enumerate(_MINRES)}
"""Rows of the numbers of MINRES, by name, in the notation of csrc/krylov/minres_math.h."""
LANCZOS_STEPS = 32
"""Steps whose Lanczos matrix is kept: enough for the largest eigenvalue to a few per cent."""
LANCZOS = len(_MINRES)
"""First row of the Lanczos matrix: diagonal and off-diagonal entry of each step in turn."""
NUMBERS = LANCZOS + 2 * LANCZOS_STEPS

Dots = Callable[[Sequence[tuple[Tensor, Tensor]]], Tensor]
"""A function from m pairs of matrices (k, n) to the dot products (m, k) of their rows, float64."""

_NULL = 0.1  # curvature, in machine epsilons of the largest one, up to which a residual counts as a null vector of H
_MOST_TERMS = 3
_KERNEL_DTYPES = (torch.float32, torch.float64)
_LIBRARY = torch.library.Library("auxfast", "FRAGMENT")
_LIBRARY.define(LINEAR_COMBINATION_SCHEMA)
_LIBRARY.define(ROW_DOTS_SCHEMA)
_LIBRARY.define(CONJUGATE_GRADIENT_STEP_SCHEMA)
_LIBRARY.define(MINRES_STEP_SCHEMA)
_CONJUGATE_GRADIENT_STEP = torch.ops.auxfast.conjugate_gradient_step_.default  # looking it up takes 1 us
_MINRES_STEP = torch.ops.auxfast.minres_step_.default


def linear_combination_(out: Tensor, terms: Sequence[Tensor], coefficients: Tensor) -> Tensor:
    """Linear combination of k rows, in one pass and in place:

        out <- coefficients[0] * out + sum_i coefficients[1 + i] * terms[i]        returns each row's sum of out^2

    A coefficient of exactly 0 leaves its operand out, whatever it holds (0 * nan = 0): coefficients (1, 0, ..) freeze
    a row, and 0 for `out` overwrites it.

    Args:
        out: (k, n), contiguous; k and n may be 0.
        terms: one to three tensors of the shape, dtype and device of `out`, contiguous; each shares no memory with
            `out` or is `out` itself.
        coefficients: (1 + number of terms, k) float64 on the same device; rounded to the dtype of `out`, or to float32
            if that is narrower, before they are used.

    Returns:
        (k,) float64 on the device: the squared Euclidean norms of the new rows. Nothing waits for the device to
        finish. Not differentiable.

    float32 and float64 run on the kernels, in an order of additions that depends on k and n only; other dtypes run on
    the reference.

    Raises:
        RuntimeError: shapes, dtypes, devices or layouts other than these; a term that overlaps `out` in part; or a
            tensor that requires a gradient where gradients are recorded.
    """
    _refuse_gradients("linear_combination_", out, *terms, coefficients)
    if use_native(out.device) and out.dtype in _KERNEL_DTYPES:
        squares: Tensor = torch.ops.auxfast.linear_combination_.default(out, terms, coefficients)
        torch.autograd.graph.increment_version(out)  # as torch's own in-place operations do: whoever saved the
        return squares  # old values for a backward pass gets an error
    return linear_combination_reference_(out, terms, coefficients)


def linear_combination_reference_(out: Tensor, terms: Sequence[Tensor], coefficients: Tensor) -> Tensor:
    """`linear_combination_` in PyTorch operations, for any device with float64 and any floating dtype; the kernels are
    tested against it."""
    _check_combination(out, terms, coefficients)
    dtype = torch.promote_types(out.dtype, torch.float32)
    total = torch.zeros_like(out, dtype=dtype)
    for coefficient, operand in zip(coefficients.to(dtype)[..., None], (out, *terms), strict=True):  # (k, 1), (k, n)
        total = torch.where(coefficient == 0, total, total + coefficient * operand)
    out.copy_(total)
    return row_dots_reference(out, out)


def row_dots(a: Tensor, b: Tensor) -> Tensor:
    """The k dot products of the rows of `a` and `b`, in one pass.

    Args:
        a: (k, n), contiguous; k and n may be 0.
        b: of the shape, dtype and device of `a`, contiguous; may be `a` itself.

    Returns:
        (k,) float64 on the device, from float64 products and sums. Nothing waits for the device to finish. Not
        differentiable.

    float32 and float64 run on the kernels, in an order of additions that depends on k and n only; other dtypes run on
    the reference.

    Raises:
        RuntimeError: shapes, dtypes, devices or layouts other than these; or a tensor that requires a gradient where
            gradients are recorded.
    """
    _refuse_gradients("row_dots", a, b)
    if use_native(a.device) and a.dtype in _KERNEL_DTYPES:
        dots: Tensor = torch.ops.auxfast.row_dots.default(a, b)
        return dots
    return row_dots_reference(a, b)


def row_dots_reference(a: Tensor, b: Tensor) -> Tensor:
    """`row_dots` in PyTorch operations."""
    _check_rows("row_dots", "a", a)
    _check_matches("row_dots", "b", b, "a", a)
    return torch.linalg.vecdot(a.double(), b.double())


def dots_reference(pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """See `Dots`."""
    return torch.stack([row_dots_reference(a, b) for a, b in pairs])


def conjugate_gradient_step_(
    x: Tensor, best: Tensor, r: Tensor, p: Tensor, z: Tensor | None, product: Tensor, numbers: Tensor, part: int = WHOLE
) -> None:
    """A step of conjugate gradients (Hestenes & Stiefel 1952) on k rows, in place: the vectors and all scalars.

    A row stops, and stays as it is from then on, where it has reached its tolerance, met curvature that is negative or
    none, or where something is not finite. Where an iterate is the best so far and the next one is worse, it is copied
    to `best`.

    Args:
        x: (k, n), the iterate.
        best: (k, n), see above.
        r: (k, n), the residual of x.
        p: (k, n), the direction; a new one is written.
        z: (k, n), r preconditioned; `None` without a preconditioner.
        product: (k, n), the products with p.
        numbers: (NUMBERS, k) float64, what is known of each row; see CONJUGATE_GRADIENT_NUMBERS.
        part: WHOLE, without z. With a preconditioner BEFORE_PRECONDITIONER, which leaves the new r, and then, with the
            new z, AFTER_PRECONDITIONER.

    All matrices are contiguous, of one dtype and on one device, and share no memory. Sums and scalars are float64.
    Nothing waits for the device to finish. Not differentiable.

    float32 and float64 run on the kernels, in an order of additions that depends on k and n only; other dtypes run on
    the reference.

    Raises:
        RuntimeError: shapes, dtypes, devices or layouts other than these; z where the part has none, or the reverse;
            or a tensor that requires a gradient where gradients are recorded.
    """
    _refuse_gradients("conjugate_gradient_step_", x, r, p, product)
    if use_native(r.device) and r.dtype in _KERNEL_DTYPES:
        _CONJUGATE_GRADIENT_STEP(x, best, r, p, z, product, numbers, part)
        torch.autograd.graph.increment_version(p)  # of all that is written, a product's graph may have saved only this
    else:
        conjugate_gradient_step_reference_(x, best, r, p, z, product, numbers, part)


def conjugate_gradient_step_reference_(
    x: Tensor,
    best: Tensor,
    r: Tensor,
    p: Tensor,
    z: Tensor | None,
    product: Tensor,
    numbers: Tensor,
    part: int = WHOLE,
    dots: Dots = dots_reference,
) -> None:
    """`conjugate_gradient_step_` in PyTorch operations; Saad, Iterative Methods for Sparse Linear Systems (2003),
    algorithm 9.1. csrc/krylov/conjugate_gradient_math.h has the derivation. With other `dots` the rows may be pieces,
    of which other processes have the rest."""
    _check_conjugate_gradient_step(x, best, r, p, z, product, numbers, part)
    of = _Numbers(numbers, _CONJUGATE_GRADIENT, torch.finfo(r.dtype).eps)
    if part != AFTER_PRECONDITIONER:
        of.start()
        pq, zq = dots([(p, product), (r if z is None else z, product)])
        curvature = pq / of["pp"]
        of.stop(~curvature.isfinite(), BROKEN)
        of.set(largest=torch.maximum(of["largest"], curvature.abs()))
        flat = of.eps * of["largest"]
        of.set(negative=torch.where(curvature < -flat, 1.0, of["negative"]))
        of.stop(curvature < -flat, CURVED)
        of.stop(curvature <= flat, SINGULAR)
        lengths = (of["pp_before"] * of["pp"]).sqrt()
        of.note_asymmetry((pq - zq) / (of["beta"] * lengths * of["largest"]))
        of.set(alpha=of["rz"] / pq)

        of.write(r, r - of["alpha"][:, None] * product)
        (square,) = dots([(r, r)])
        of.stop(~square.isfinite(), BROKEN)
        leaves = (of["square"] <= of["best_square"]) & (square > of["square"])
        of.set(leaves=leaves.double(), best_square=torch.where(leaves, of["square"], of["best_square"]), square=square)
    if part != BEFORE_PRECONDITIONER:
        z = r if z is None else z
        rz = dots([(r, z)])[0] if part == AFTER_PRECONDITIONER else of["square"]
        alpha, beta = of["alpha"], rz / of["rz"]
        if part == WHOLE:
            of.record(1 / alpha + of["beta_by_alpha"], beta.sqrt() / alpha)
        of.set(rz=rz, beta=beta, beta_by_alpha=beta / alpha, steps=of["steps"] + 1)
        reached = of["square"] <= of["tolerance"].square()
        of.stop(reached, REACHED, moves=1)
        of.stop(~reached & ~(rz > 0), BROKEN, moves=1)  # a preconditioner that is not positive definite
        of.write(best, torch.where(of["leaves"][:, None] != 0, x, best))
        of.write(x, x + of["alpha"][:, None] * p)
        of.write(p, of["beta"][:, None] * p + z)
        of.set(pp_before=of["pp"], pp=dots([(p, p)])[0])


def minres_step_(
    x: Tensor,
    w: Tensor,
    w_old: Tensor,
    v: Tensor,
    u: Tensor,
    u_old: Tensor,
    r: Tensor,
    z: Tensor | None,
    product: Tensor,
    numbers: Tensor,
    part: int = WHOLE,
) -> None:
    """A step of MINRES (Paige & Saunders 1975) on k rows, in place: the vectors and all scalars.

    A row stops, and stays as it is from then on, where it has reached its tolerance, where its residual is a null
    vector, before a step whose rounding outweighs its gain, or where something is not finite.

    Args:
        x: (k, n) float64, the iterate.
        w, w_old: (k, n) float64, the directions of the last two steps; `w_old` becomes the next one.
        v: (k, n), the Lanczos vector; the next one is written.
        u, u_old: (k, n), the Lanczos vectors of this step and of the one before, not normalised nor preconditioned.
        r: (k, n), the residual of x.
        z: (k, n), the next u preconditioned; `None` without a preconditioner.
        product: (k, n), the products with v; becomes the next u.
        numbers: (NUMBERS, k) float64, what is known of each row; see MINRES_NUMBERS.
        part: WHOLE. With a preconditioner BEFORE_PRECONDITIONER, which leaves the next u, and then, with its z,
            AFTER_PRECONDITIONER.

    Matrices without a dtype here have that of r. All are contiguous and on one device, and those that are written share
    no memory with others. Sums and scalars are float64. Nothing waits for the device to finish. Not differentiable.

    float32 and float64 run on the kernels, in an order of additions that depends on k and n only; other dtypes run on
    the reference.

    Raises:
        RuntimeError: shapes, dtypes, devices or layouts other than these; z where the part has none, or the reverse;
            or a tensor that requires a gradient where gradients are recorded.
    """
    _refuse_gradients("minres_step_", x, v, r, product)
    if use_native(r.device) and r.dtype in _KERNEL_DTYPES:
        _MINRES_STEP(x, w, w_old, v, u, u_old, r, z, product, numbers, part)
        torch.autograd.graph.increment_version(v)  # of all that is written, a product's graph may have saved only this
    else:
        minres_step_reference_(x, w, w_old, v, u, u_old, r, z, product, numbers, part)


def minres_step_reference_(
    x: Tensor,
    w: Tensor,
    w_old: Tensor,
    v: Tensor,
    u: Tensor,
    u_old: Tensor,
    r: Tensor,
    z: Tensor | None,
    product: Tensor,
    numbers: Tensor,
    part: int = WHOLE,
    dots: Dots = dots_reference,
) -> None:
    """`minres_step_` in PyTorch operations; csrc/krylov/minres_math.h has the derivation. `dots`: as for
    `conjugate_gradient_step_reference_`."""
    _check_minres_step(x, w, w_old, v, u, u_old, r, z, product, numbers, part)
    of = _Numbers(numbers, _MINRES, torch.finfo(r.dtype).eps)
    if part != AFTER_PRECONDITIONER:
        of.start()
        of.set(alfa=dots([(v, product)])[0])
        of_u, of_u_old = (of["alfa"] / of["beta"])[:, None], of["beta_ratio"][:, None]
        of.write(product, product - of_u * u - of_u_old * u_old)
    if part != BEFORE_PRECONDITIONER:
        z = product if z is None else z
        square, overlap = dots([(product, z), (u_old, z)])
        _rotate(of, square.sqrt(), overlap, part)
        gamma, beta = of["gamma"], of["beta"]
        new_w = (v.double() - of["delta"][:, None] * w - of["epsilon_before"][:, None] * w_old) / gamma[:, None]
        of.write(w_old, new_w)
        of.write(v, torch.where(beta > 0, 1 / beta, 0)[:, None] * z)  # 0 in an invariant subspace, where the row stops
        of_r, of_u = of["s"].square(), -of["c"] * of["phibar_before"] / gamma
        of.write(r, of_r[:, None] * r + of_u[:, None] * product)
        of.set(steps=of["steps"] + 1)
        of_w, square = dots([(w_old, w_old), (r, r)])
        before = of["phibar_before"]
        if part == WHOLE:
            rounding = of.eps * of["largest"] * of["phi"].abs() * of_w.sqrt()
            of.stop(~(rounding < torch.maximum(of.eps**0.5 * before, before - of["phibar"])), SINGULAR)
        of.set(square=square)
        of.stop(square.sqrt() <= of["tolerance"], REACHED, moves=1)
        of.write(x, x + of["phi"][:, None] * w_old)


def _rotate(of: _Numbers, beta: Tensor, overlap: Tensor, part: int) -> None:
    """The new column of the tridiagonal matrix: applies the last rotation to it, and makes the next one."""
    alfa, c, s, before = of["alfa"], of["c"].clone(), of["s"].clone(), of["beta"].clone()
    largest = torch.maximum(of["largest"], torch.hypot(alfa, beta))
    of.note_asymmetry(overlap * of["beta_ratio"] / (before * largest))
    if part == WHOLE:
        of.record(alfa, beta)
    delta, gbar, dbar = c * of["dbar"] + s * alfa, s * of["dbar"] - c * alfa, -c * beta
    curvature, slope = -c * gbar, torch.hypot(gbar, dbar)
    of.stop(~slope.isfinite(), BROKEN)  # a preconditioner that is not positive definite ends here too
    flat = of.eps * largest
    of.set(largest=largest, negative=torch.where(curvature < -flat, 1.0, of["negative"]))
    of.stop((curvature.abs() <= _NULL * flat) & (slope.square() <= _NULL * flat * largest), SINGULAR)
    gamma, phibar = torch.hypot(gbar, beta), of["phibar"].clone()
    of.set(epsilon_before=of["epsilon"], epsilon=s * beta, dbar=dbar, delta=delta, beta=beta, beta_ratio=beta / before)
    of.set(gamma=gamma, c=gbar / gamma, s=beta / gamma, phi=gbar / gamma * phibar)
    of.set(phibar_before=phibar, phibar=of["s"] * phibar)


class _Numbers:
    """The numbers of k rows by name, for the references. Only rows that move are written.

    Attributes:
        eps: the machine epsilon, of rounding relative to the largest curvature.
    """

    def __init__(self, numbers: Tensor, names: Sequence[str], eps: float) -> None:
        self._rows = dict(zip(names, numbers, strict=False))
        self._lanczos = numbers[LANCZOS:]
        self.eps = eps

    def __getitem__(self, name: str) -> Tensor:
        return self._rows[name]

    def start(self) -> None:
        """All rows move that have not stopped."""
        self["moves"].copy_(self["status"] == RUNNING)

    @property
    def _moving(self) -> Tensor:
        return self["moves"] != 0

    def set(self, **values: Tensor) -> None:
        for name, value in values.items():
            self[name].copy_(torch.where(self._moving, value, self[name]))

    def write(self, vectors: Tensor, values: Tensor) -> None:
        vectors.copy_(torch.where(self._moving[:, None], values.to(vectors.dtype), vectors))

    def stop(self, where: Tensor, status: int, moves: int = 0) -> None:
        """Stops rows; with `moves` they end the step before."""
        where = where & self._moving
        self["status"].masked_fill_(where, status)
        self["moves"].masked_fill_(where, moves)

    def note_asymmetry(self, error: Tensor) -> None:
        error, steps = error.abs(), self["steps"]
        self.set(asymmetry=torch.where(steps == 1, error, self["asymmetry"]))
        self.set(noise=self["noise"] + torch.where(steps > 0, error.square(), 0))

    def record(self, diagonal: Tensor, off_diagonal: Tensor) -> None:
        goes = self._moving & (self["steps"] < LANCZOS_STEPS)
        place = 2 * self["steps"].clamp(max=LANCZOS_STEPS - 1).long()
        places = torch.stack([place, place + 1])  # (2, k)
        entries = torch.where(goes, torch.stack([diagonal, off_diagonal]), self._lanczos.gather(0, places))
        self._lanczos.scatter_(0, places, entries)


def _check_conjugate_gradient_step(
    x: Tensor, best: Tensor, r: Tensor, p: Tensor, z: Tensor | None, product: Tensor, numbers: Tensor, part: int
) -> None:
    op = "conjugate_gradient_step_"
    _check_rows(op, "r", r)
    for name, rows in (("x", x), ("best", best), ("p", p), ("z", z), ("product", product)):
        if rows is not None:
            _check_matches(op, name, rows, "r", r)
    _check_numbers(op, numbers, r, z, part, BEFORE_PRECONDITIONER)


def _check_minres_step(
    x: Tensor,
    w: Tensor,
    w_old: Tensor,
    v: Tensor,
    u: Tensor,
    u_old: Tensor,
    r: Tensor,
    z: Tensor | None,
    product: Tensor,
    numbers: Tensor,
    part: int,
) -> None:
    op = "minres_step_"
    _check_rows(op, "r", r)
    for name, rows in (("v", v), ("u", u), ("u_old", u_old), ("z", z), ("product", product)):
        if rows is not None:
            _check_matches(op, name, rows, "r", r)
    for name, rows in (("x", x), ("w", w), ("w_old", w_old)):
        _check_float64(op, name, rows, r.shape, r)
    _check_numbers(op, numbers, r, z, part, AFTER_PRECONDITIONER)


def _check_numbers(op: str, numbers: Tensor, r: Tensor, z: Tensor | None, part: int, first_with_z: int) -> None:
    _check_float64(op, "numbers", numbers, (NUMBERS, len(r)), r)
    if part not in (WHOLE, BEFORE_PRECONDITIONER, AFTER_PRECONDITIONER):
        raise RuntimeError(f"auxfast::{op}: part must be 0, 1 or 2, not {part}")
    if (z is not None) != (part >= first_with_z):
        needed = "be given" if part >= first_with_z else "be None"
        raise RuntimeError(f"auxfast::{op}: z must {needed} for part {part}")


def _check_float64(op: str, name: str, rows: Tensor, shape: Sequence[int], like: Tensor) -> None:
    if tuple(rows.shape) != tuple(shape):
        raise RuntimeError(f"auxfast::{op}: {name} has shape {tuple(rows.shape)}, not {tuple(shape)}")
    if rows.dtype != torch.float64 or not rows.is_contiguous():
        raise RuntimeError(f"auxfast::{op}: {name} must be contiguous and have dtype float64")
    if rows.device != like.device:
        raise RuntimeError(f"auxfast::{op}: {name} and r must be on one device")


def _refuse_gradients(op: str, *tensors: Tensor) -> None:
    if not torch.is_grad_enabled():
        return
    for tensor in tensors:  # `any` would make a generator, which takes longer
        if tensor.requires_grad:
            raise RuntimeError(f"{op} is not differentiable: detach its arguments, or call it in torch.no_grad()")


def _check_combination(out: Tensor, terms: Sequence[Tensor], coefficients: Tensor) -> None:
    """Checks of the kernel, for the reference: torch's operations would broadcast and promote."""
    op = "linear_combination_"
    _check_rows(op, "out", out)
    if not 1 <= len(terms) <= _MOST_TERMS:
        raise RuntimeError(f"auxfast::{op}: terms must be 1 to {_MOST_TERMS} tensors, not {len(terms)}")
    for i, term in enumerate(terms):
        _check_matches(op, f"terms[{i}]", term, "out", out)
        if _overlaps_in_part(term, out):
            raise RuntimeError(f"auxfast::{op}: terms[{i}] and out share memory, but do not start together")
    for what, given, wanted in (
        ("shape", tuple(coefficients.shape), (1 + len(terms), len(out))),
        ("dtype", coefficients.dtype, torch.float64),
        ("device", coefficients.device, out.device),
    ):
        if given != wanted:
            raise RuntimeError(f"auxfast::{op}: coefficients has {what} {given}, not {wanted}")


def _check_rows(op: str, name: str, rows: Tensor) -> None:
    if not rows.is_floating_point():
        raise RuntimeError(f"auxfast::{op}: {name} must be of a floating dtype, not {rows.dtype}")
    if rows.dim() != 2 or not rows.is_contiguous():
        given = f"shape {tuple(rows.shape)} with strides {rows.stride()}"
        raise RuntimeError(f"auxfast::{op}: {name} must be a contiguous (k, n) tensor, not of {given}")


def _check_matches(op: str, name: str, rows: Tensor, like_name: str, like: Tensor) -> None:
    _check_rows(op, name, rows)
    for what, given, wanted in (
        ("shape", tuple(rows.shape), tuple(like.shape)),
        ("dtype", rows.dtype, like.dtype),
        ("device", rows.device, like.device),
    ):
        if given != wanted:
            raise RuntimeError(f"auxfast::{op}: {name} has {what} {given}, not {wanted} as {like_name}")


def _overlaps_in_part(a: Tensor, b: Tensor) -> bool:
    """Whether two contiguous tensors of one shape and dtype share memory, but not element by element."""
    one_storage = a.untyped_storage() is b.untyped_storage()
    distance = a.storage_offset() - b.storage_offset()
    return one_storage and distance != 0 and -a.numel() < distance < a.numel()


def _linear_combination_fake(out: Tensor, terms: Sequence[Tensor], coefficients: Tensor) -> Tensor:
    _check_combination(out, terms, coefficients)
    return out.new_empty(len(out), dtype=torch.float64)


def _row_dots_fake(a: Tensor, b: Tensor) -> Tensor:
    _check_rows("row_dots", "a", a)
    _check_matches("row_dots", "b", b, "a", a)
    return a.new_empty(len(a), dtype=torch.float64)


_LIBRARY.impl("linear_combination_", linear_combination_reference_, "CompositeExplicitAutograd")
_LIBRARY.impl("row_dots", row_dots_reference, "CompositeExplicitAutograd")
_LIBRARY.impl("conjugate_gradient_step_", conjugate_gradient_step_reference_, "CompositeExplicitAutograd")
_LIBRARY.impl("minres_step_", minres_step_reference_, "CompositeExplicitAutograd")
torch.library.register_fake("auxfast::conjugate_gradient_step_", _check_conjugate_gradient_step, lib=_LIBRARY)
torch.library.register_fake("auxfast::minres_step_", _check_minres_step, lib=_LIBRARY)
torch.library.register_fake("auxfast::linear_combination_", _linear_combination_fake, lib=_LIBRARY)
torch.library.register_fake("auxfast::row_dots", _row_dots_fake, lib=_LIBRARY)
