"""Which codes can win, and when float32 is enough to tell: the theorems that the fast engines use.

Write n for the block size, M for the block's largest |w|, s[k] for the scale under E4M3 code k, v[k]
for its E4M3 value and e(s) = sum_i min_q (|w_i| - q s)^2 for the error at scale s, with q in the
E2M1 grid Q = {0, .5, 1, 1.5, 2, 3, 4, 6}. "The answer" is the lowest code >= min_code of least e.

Premise 0 (exact doubling). Where v[j] = 2 v[k] also s[j] = 2 s[k] exactly: s is three roundings of
v, each of which commutes with doubling unless a result is subnormal. global_amax >= 2^-100 keeps
every s[k] above 2^-121, so it suffices. Below it no bound is used and all codes are searched.

Theorem 1 (no code above the window wins). Let M <= 3.5 s[k], and let code h >= min_code have
v[h] = v[k] / 2. Then e(s[h]) <= e(s[k]), so k, the higher code, is not the answer.
    Proof. Up to 3.5 s the point 3 s is at least as near as 4 s, so e(s) uses only {0, .5, 1, 1.5, 2, 3} s,
    and these are {0, 1, 2, 3, 4, 6} (s/2), points of the grid at s/2. Holds element by element.
    Which codes have such an h: from 16 up code k - 8 is the half, below it k / 2
    where k is even. So every code above max(15, min_code + 7) has one that may be chosen.

Theorem 2 (no code below the window wins). Let code d <= 126 have v[d] = 2 v[k], and let
M > (7 + (n - 1) / 16) s[k]. Then e(s[d]) < e(s[k]), so k is not the answer.
    Proof. Write r for s[k]. The largest element contributes (M - 6r)^2 at r, and at 2r at most
    (M - 8r)^2, since 8r = 4 (2r) is a point there: a change of at most 28 r^2 - 4 M r. The grid at 2r
    has {0, 1, 2, 3, 4, 6} r and more; it lacks only .5 r and 1.5 r of the grid at r, so any other
    element's error grows by at most r^2 / 4. The sum is negative when 4 M > 28 r + (n - 1) r / 4.
    Codes up to 118 have such a d; 119 .. 126 never fall to this theorem.

Theorem 3 (blocks too small to matter). If M <= s[min_code] / 4 every element rounds to 0 at every
code, all errors equal sum w^2, and the answer is min_code.

Theorem 4 (float32 margin). Let u = 2^-24, 2^-45 <= M <= 2^60 and s >= 2^-50. Compute q by one fused
rounding of |w| (1 / s) to the step of its binade, r = fma(q, -s, |w|) and e by a chain (or any tree) of
fma(r, r, e). Then |computed - e| <= (n + 32) u e + n 2^-124.
    Proof. s is a float32 by definition, so r is one rounding of the true residual: relative error u in
    r, 2u in r^2, and n u from summation, to first order; the factor 3 below covers the rest. The
    rounding of 1 / s moves y = |w| / s by a relative u, so q is a nearest point unless y lies within
    u y of a midpoint; then the two residuals are (h + u y) s and (h - u y) s at most and at least (h half
    the gap), and their squares differ by a factor 1 + 4 u y / h to first order, where y / h <= 7 at every
    midpoint: 28 u. The absolute term covers results below float32's normal range, flushed to zero or
    not, in up to two operations an element. Within the premises nothing that decides q overflows, and
    a square of |w| that underflows belongs to an element with y < 2, where its value does not matter.
    The rounding: subtracting y from an m whose unit in the last place is the step wanted at y (.5 to 2,
    1 to 4, 2 to 6) rounds y to that step, once. m = 2^22 (ROUNDER_BASE + ROUNDER_SLOPE y^2) enters its next
    binade at y = 2.2 and y = 3.95, where both steps give the same point. Up to y = 26 a y beyond 6 gives 6 or
    more. So does, for scales with s / s' in [8/9, 9/8], the m that they share: 2^22 max(SHARED_ROUNDER_FLOOR,
    SHARED_ROUNDER_SLOPE y s / s') changes binade at y in [1.76, 2.24] and [3.52, 4.47], and from 7.05 up.
Hence two computed errors compare rightly if the larger exceeds the smaller by the factor
1 + 3 (n + 32) u and by 4 n 2^-124 more. Every other pair is settled exactly, and so is every block
outside the premises.

Theorem 5 (exact comparison). With A = sum |w_i| q_i, B = sum q_i^2 and q_i nearest points at s,
e(s) = sum w^2 + s^2 B - 2 s A, so two scales compare by f(s) = s^2 B - 2 s A alone. For n <= 2^18,
computing A and B in float64 and f as an error-free pair of float64 gives the lowest code of least error.
    Proof. s has 24 bits. A w_i with q_i != 0 is at least s / 4, so it is a multiple of ulp(s) / 4, and q_i is
    one of 1/2. Where sum |w_i| <= 2^23 s, A is below 2^53 of its units ulp(s) / 8 and exact in any order,
    B is, and f is below 2^78 of its units ulp(s)^2 / 4: the pair (106 bits) holds it. Otherwise s
    loses to the next larger scale s' = s + d, d >= s / 15, by more than rounding hides: the elements
    above 16 s hold half of W = sum |w_i| or more and gain 0.17 W s together; any other loses at most
    2.25 s^2 (s^2 / 4 where s' = 2 s), together less than 0.08 W s, and |f| <= 12 W s.

With importances h_i >= 0, not all 0, write e(s) = sum_i h_i min_q (|w_i| - q s)^2, and M for the largest
|w_i| with h_i > 0. Theorems 1 and 3 hold for it, element by element.

Theorem 6 (no code below wins, with importances). For every s' <= s: e(s') >= sum_i h_i max(0, |w_i| - 6s)^2.
Once that exceeds an error found, all codes from there down are out: a walk down from theorem 1's bound
stops with a certificate.
    Proof. No point at s' exceeds 6 s'.

Theorem 7 (a first code, with importances). Let H = sum h_i. A code below 119 whose scale r satisfies
r < 16 h_m |w_m| / (111 h_m + H) for some m, and whose double v[d] = 2 v[k] exists, is not the answer.
    Proof. As theorem 2, with element m in place of the largest: it gains h_m (4 |w_m| r - 28 r^2), the
    others lose (H - h_m) r^2 / 4 at most. With equal h_i this is theorem 2.

Theorem 8 (float32 margin, with importances). As theorem 4, with fma(r r, h, e) for each term:
|computed - e| <= (n + 34) u e + n 2^-124 max(1, h_1, ..., h_n).
    Proof. One product more is rounded; a square below float32's normal range is off by 2^-126, times h.

Theorem 9 (exact comparison, with importances). With p_i = q_i s, u_i = p'_i - p_i and
v_i = 2 |w_i| - p_i - p'_i, e(s) - e(s') = sum_i h_i u_i v_i. In float64 u_i is exact and v_i is one and a
rest, so each product is a sum of eight float64s, by error-free products: multiples of 2^-449, up to 2^386.
Elements with equal points or opposite residuals have none. The sign of the sum of the others takes integers,
or their leading bits first.
    Proof. q_i has 2 bits in halves, s has 24, and no scale is 2^18 times another: p_i and p'_i are multiples
    of ulp / 2 of the lesser scale, below 2^46 of them. Where h_i r_i^2 are compared themselves, they are
    multiples of 2^-449 too, and sums of 2^20 of them are below 2^407.

With a Hessian H (symmetric, n = 16) write e(s) = r^T H r, c_i = sum_j |H_ij|, P(s) = sum_i c_i r_i^2, and let
mu be such that H - mu diag(c) is positive semidefinite.

Theorem 10 (codes that cannot win, with a Hessian). mu P(s) <= e(s) <= P(s). Hence a code is out if mu P
there exceeds an error found. For mu >= 0: from s up, P >= sum c_i min(|w_i|, max(0, s/2 - |w_i|))^2; from s
down, P >= sum c_i max(0, |w_i| - 6s)^2. All codes with s >= 4M (M: over c_i > 0) have the same error.
    Proof. |r_i r_j| <= (r_i^2 + r_j^2) / 2. No point lies between 0 and s / 2, at s and above.

Theorem 11 (margins, with a Hessian). With q_i as defined (the nearest point, in a tie the even code), r_i
rounded once and sums over j, then over i, each in any order, of products rounded in either order:
|computed - e| <= (2n + 8) v P for arithmetic of unit roundoff v, and 2^-113 (1 + M^2) more where a float32
may underflow, for H scaled to a largest element in [1, 2). As with importances e(s) - e(s') is
sum_ij H_ij u_i v_j, with p_i = q_i s and w_i signed. Unlike with sums of squares, a
q that is not the nearest point is not nearly as good.
    Proof. The terms' sizes sum to |r|^T |H| |r| <= P. Each is rounded once for r_i and r_j, twice as a
    product, and n - 1 times in each of two sums; 2 n + 2 roundings, to first order. What underflows, flushed
    or not, is off by 2^-126. For an element of H that counts r_i r_j <= M^2 times; for r_i, a product or a
    sum over j 2 n M times; for a sum over i once. Together less than 2^-116 M^2 + 2^-114 M + 2^-120.

Theorem 12 (small scales, with a Hessian). Let nu = max(0, -mu), P0 = sum c_i w_i^2, 0 <= N^2 <= w^T H w and
S^2 = 36 (1 + nu) sum c_i. An error E found rules out all codes with s < (N - sqrt(E + nu P0)) / S. It needs
no mu > 0: it bounds the codes of Hessians of few tokens, which are singular.
    Proof. H' = H + nu diag(c) is positive semidefinite, so |x| = sqrt(x^T H' x) is a seminorm. |q| <= S, as
    q_i <= 6, so |r| >= |w| - s |q| >= N - s S > sqrt(E + nu P0). And e(s) = |r|^2 - nu P(s), where
    P(s) <= P0, as no nearest point is farther than 0.

For n = 16 the window [M / 7.9375, M / 3.5] holds at most 10 codes. The bound -3 .. +7 codes around absmax
that others publish is the same window without the premises: codes below 16 and above 118 break it.
"""

from typing import NamedTuple

import numpy as np

from nvfp4sweep.formats import E4M3_VALUES, MAX_CODE

#: Premise 0: for a smaller global amax the fast engines search every code exactly.
LEAST_GLOBAL_AMAX = 2.0**-100
#: Theorem 1: a code whose scale is at least M / 3.5 is not needed if its half may be chosen.
UPPER_RATIO = 3.5
#: Theorem 2 says nothing about codes from here up: they have no double.
FIRST_UNDOUBLED_CODE = 119
#: Theorem 1 says nothing about codes up to this one, or up to min_code + 7.
LAST_UNHALVED_CODE = 15
#: Theorem 4: outside these a float32 square may overflow, or lose what decides a rounding.
LEAST_FLOAT32_PEAK = 2.0**-45
GREATEST_FLOAT32_PEAK = 2.0**60
LEAST_FLOAT32_SCALE = 2.0**-50
#: With importances up to 4, or a Hessian's up to 2, sums of 2^18 products then stay in float32's range.
GREATEST_WEIGHTED_PEAK = 2.0**50
#: Theorem 4: what rounds y to an E2M1 point.
ROUNDER_BASE = 1.1
ROUNDER_SLOPE = 0.186
#: Theorem 4: what rounds y to an E2M1 point for three neighbouring codes at once.
SHARED_ROUNDER_SLOPE = 1.008
SHARED_ROUNDER_FLOOR = 1.95
#: It takes y above 7 to 8, so that there (and a little below) q must be cut at 6.
CLIPPING_RATIO = 7 * (1 - 2.0**-19)
#: Within this and GREATEST_FLOAT32_PEAK a global amax keeps the blocks with normal codes in theorem 4.
LEAST_SCREENED_AMAX = 2.0**-30
#: From this code up neighbouring scales differ by a factor 9 / 8 at most.
FIRST_NORMAL_CODE = 8
#: More than the relative rounding of s and of M times a factor below: such a code is kept.
_SLACK = 2.0**-20
#: Theorem 11: of P, in float32 and in float64.
HESSIAN_MARGIN_FLOAT32 = 48 * 2.0**-24
HESSIAN_MARGIN_FLOAT64 = 48 * 2.0**-53
#: A Hessian may be off by this much of its largest element from symmetric and positive semidefinite: what
#: sums of products leave that were rounded to bfloat16 or TF32.
HESSIAN_TOLERANCE = 2.0**-10
#: A larger block_size is refused by the fast engines (theorem 5).
MAX_BLOCK_SIZE = 2**18


class Window(NamedTuple):
    """The constants of the window and of the float32 margin for one block size.

    A block with largest magnitude M may take the codes whose E4M3 value v satisfies
    lower <= v * global_amax / (M * 2688) < upper, and those that the theorems say nothing about.
    """

    lower: float
    upper: float
    relative_margin: float
    absolute_margin: float


def importance_margins(block_size: int) -> tuple[float, float]:
    """As the margins of `window`, with importances (theorem 8); the absolute one for importances up to 1."""
    return 3 * (block_size + 34) * 2.0**-24, 4 * block_size * 2.0**-124


def window(block_size: int) -> Window:
    lower_ratio = 7 + (block_size - 1) / 16
    return Window(
        lower=(1 - _SLACK) / lower_ratio,
        upper=(1 + _SLACK) / UPPER_RATIO,
        relative_margin=3 * (block_size + 32) * 2.0**-24,
        absolute_margin=4 * block_size * 2.0**-124,
    )


def last_unhalved_code(min_code: int) -> int:
    """Up to this code theorem 1 may lack its premise."""
    return min(MAX_CODE, max(LAST_UNHALVED_CODE, min_code + 7))


def most_candidates(block_size: int) -> int:
    """The most codes that a window holds where both theorems have their premises: 10 for 16."""
    bounds = window(block_size)
    values = E4M3_VALUES
    return max(
        int(np.count_nonzero((values >= v) & (values < v * bounds.upper / bounds.lower)))
        for v in values[LAST_UNHALVED_CODE + 1 : FIRST_UNDOUBLED_CODE]
    )
