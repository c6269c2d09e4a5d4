//! Numbers of answers: exact fractions as long as they fit, finite floating point beyond.

/// A number.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Num {
    /// The fraction in lowest terms with a positive denominator, when it fits.
    exact: Option<(i128, i128)>,
    /// Its value, always there; infinite only for ∞ itself.
    approx: f64,
    /// Whether it was written as a whole number.
    whole: bool,
}

/// Equal to this share of the larger.
const TOLERANCE: f64 = 1e-9;

fn gcd(mut a: u128, mut b: u128) -> u128 {
    while b != 0 {
        (a, b) = (b, a % b);
    }
    a
}

impl Num {
    fn fraction(p: i128, q: i128) -> Option<Self> {
        if q == 0 {
            return None;
        }
        let g = i128::try_from(gcd(p.unsigned_abs(), q.unsigned_abs())).ok()?;
        let (p, q) = (p / g, q / g);
        let (p, q) = if q < 0 {
            (p.checked_neg()?, q.checked_neg()?)
        } else {
            (p, q)
        };
        Some(Self {
            exact: Some((p, q)),
            approx: p as f64 / q as f64,
            whole: q == 1,
        })
    }

    pub(super) fn real(approx: f64) -> Option<Self> {
        approx.is_finite().then_some(Self {
            exact: None,
            approx,
            whole: false,
        })
    }

    pub(super) fn infinity() -> Self {
        Self {
            exact: None,
            approx: f64::INFINITY,
            whole: false,
        }
    }

    pub(super) fn whole(n: i128) -> Self {
        Self {
            exact: Some((n, 1)),
            approx: n as f64,
            whole: true,
        }
    }

    /// Digits with an optional point and exponent, as `parse` of the standard library reads them.
    pub(super) fn read(text: &str) -> Option<Self> {
        let approx: f64 = text.parse().ok()?;
        if !approx.is_finite() {
            return None;
        }
        let exact = Self::read_exact(text);
        Some(exact.unwrap_or(Self {
            exact: None,
            approx,
            whole: text.bytes().all(|b| b.is_ascii_digit()),
        }))
    }

    fn read_exact(text: &str) -> Option<Self> {
        let (digits, exponent) = match text.split_once(['e', 'E']) {
            Some((d, e)) => (d, e.parse::<i32>().ok()?),
            None => (text, 0),
        };
        let (whole, part) = digits.split_once('.').unwrap_or((digits, ""));
        let part = part.trim_end_matches('0');
        let mut p: i128 = 0;
        for b in whole.bytes().chain(part.bytes()) {
            p = p
                .checked_mul(10)?
                .checked_add(i128::from(b.checked_sub(b'0')?))?;
        }
        let shift = exponent.checked_sub(i32::try_from(part.len()).ok()?)?;
        let ten = 10i128.checked_pow(shift.unsigned_abs())?;
        if shift < 0 {
            Self::fraction(p, ten)
        } else {
            Self::fraction(p.checked_mul(ten)?, 1)
        }
    }

    pub(super) fn value(self) -> f64 {
        self.approx
    }

    pub(super) fn is_whole(self) -> bool {
        self.whole
    }

    fn both(self, other: Self) -> Option<((i128, i128), (i128, i128))> {
        Some((self.exact?, other.exact?))
    }

    pub(super) fn neg(self) -> Self {
        Self {
            exact: self.exact.and_then(|(p, q)| Some((p.checked_neg()?, q))),
            approx: -self.approx,
            whole: self.whole,
        }
    }

    pub(super) fn add(self, other: Self) -> Option<Self> {
        let sum = || {
            let ((a, b), (c, d)) = self.both(other)?;
            let left = a.checked_mul(d)?;
            Self::fraction(left.checked_add(c.checked_mul(b)?)?, b.checked_mul(d)?)
        };
        sum().or_else(|| Self::real(self.approx + other.approx))
    }

    pub(super) fn mul(self, other: Self) -> Option<Self> {
        let product = || {
            let ((a, b), (c, d)) = self.both(other)?;
            Self::fraction(a.checked_mul(c)?, b.checked_mul(d)?)
        };
        product().or_else(|| Self::real(self.approx * other.approx))
    }

    pub(super) fn div(self, other: Self) -> Option<Self> {
        if other.approx == 0.0 {
            return None;
        }
        let quotient = || {
            let ((a, b), (c, d)) = self.both(other)?;
            Self::fraction(a.checked_mul(d)?, b.checked_mul(c)?)
        };
        quotient().or_else(|| Self::real(self.approx / other.approx))
    }

    pub(super) fn pow(self, other: Self) -> Option<Self> {
        let power = || {
            let ((a, b), (n, one)) = self.both(other)?;
            let k = u32::try_from(n.unsigned_abs()).ok()?;
            if one != 1 || k > 256 {
                return None;
            }
            let (a, b) = (a.checked_pow(k)?, b.checked_pow(k)?);
            if n < 0 {
                Self::fraction(b, a)
            } else {
                Self::fraction(a, b)
            }
        };
        power().or_else(|| Self::real(self.approx.powf(other.approx)))
    }

    /// The n-th root.
    pub(super) fn root(self, n: u32) -> Option<Self> {
        let root = |x: i128| {
            let r = (x as f64).powf(1.0 / f64::from(n)).round() as i128;
            (r.checked_pow(n)? == x).then_some(r)
        };
        let exact = || {
            let (p, q) = self.exact?;
            if p < 0 {
                return None;
            }
            Self::fraction(root(p)?, root(q)?)
        };
        let approx = || {
            let x = self.approx;
            if x < 0.0 && n % 2 == 1 {
                Self::real(-(-x).powf(1.0 / f64::from(n)))
            } else {
                Self::real(x.powf(1.0 / f64::from(n)))
            }
        };
        exact().or_else(approx)
    }

    /// Whole numbers are equal or not; others to a share of 10⁻⁹.
    pub(super) fn equals(self, other: Self) -> bool {
        if let Some((a, b)) = self.both(other)
            && a == b
        {
            return true;
        }
        if self.whole && other.whole {
            // Beyond exact numbers only the text, which was compared already, can tell.
            return false;
        }
        let (a, b) = (self.approx, other.approx);
        a == b || (a - b).abs() <= TOLERANCE * a.abs().max(b.abs())
    }
}
