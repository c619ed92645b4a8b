"""Functions of one fp32 value that several kernel files share, by the formulas of csrc/core/math.h.

They do not use libdevice, so they run in the interpreter and compile anywhere. They return NaN for NaN.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._runtime import exp


@triton.jit
def clamp_to(x, limit: tl.constexpr):
    """Return x clamped to [-limit, limit]; NaN stays NaN."""
    low = tl.where(x < -limit, -limit, x)
    return tl.where(low > limit, limit, low)


@triton.jit
def normal(x):
    """Return density and cdf of the normal distribution: cdf(-a) = exp(-a^2/2) P(a t) t, t = 1 / (a + 2), a = |x|."""
    a = tl.abs(clamp_to(x, 13.1))
    e = exp(-0.5 * a * a)
    t = 1.0 / (a + 2.0)
    w = a * t
    p = -0.097487188876 + w * 0.056855879724
    p = 0.045122697949 + w * (-0.022045375779 + w * p)
    p = 0.120781302452 + w * (4.59507918e-4 + w * p)
    p = -0.191322669387 + w * (0.082399815321 + w * p)
    p = 1.0 + w * (-0.595775187016 + w * p)
    tail = tl.where(x < -13.1, 0.0, p * t * e)
    return 0.398942280 * e, tl.where(x > 0.0, 1.0 - tail, tail)


@triton.jit
def gelu(x):
    """Return value and slope of x cdf(x)."""
    density, cdf = normal(x)
    return x * cdf, cdf + clamp_to(x, 13.1) * density


@triton.jit
def gelu_tanh(x):
    """Return value and slope of x sigmoid(2 sqrt(2 / pi) (x + 0.044715 x^3))."""
    u = clamp_to(x, 10.0)  # beyond this, the value is x or 0 and the slope 1 or 0
    s2 = 0.044715 * u * u
    e = exp(-1.59576912 * u * (1.0 + s2))
    s = 1.0 / (1.0 + e)
    value = tl.where(x < -10.0, 0.0, x * s)
    return value, s + s * (e * s) * (1.59576912 * u * (1.0 + 3.0 * s2))


@triton.jit
def silu(x):
    """Return value and slope of x / (1 + exp(-x))."""
    u = clamp_to(x, 87.0)
    e = exp(-u)
    s = 1.0 / (1.0 + e)
    return tl.where(x < -87.0, 0.0, x * s), s + s * (e * s) * u


@triton.jit
def relu2(x):
    """Return value and slope of relu(x)^2."""
    r = tl.where(x < 0.0, 0.0, x)
    return r * r, 2.0 * r


@triton.jit
def tanh(x):
    """Return tanh(x), relative error 1.25 2^-23.

    x + x^3 P(x^2) where |x| < 0.625, otherwise (1 - e) / (1 + e) with e = exp(-2 |x|) and the sign of x.
    """
    a = tl.abs(x)
    s = x * x
    p = -0.0537397155531 + s * (0.0206390887954 - s * 0.00570498872745)
    p = -0.333332819422 + s * (0.133314422036 + s * p)
    e = exp(-2.0 * a)
    far = (1.0 - e) / (1.0 + e)
    return tl.where(a < 0.625, x + x * (s * p), tl.where(x < 0.0, -far, far))
