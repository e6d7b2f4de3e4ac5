// The standard normal distribution in double precision, and what a test on one retraining can do.

const density = (x) => Math.exp(-0.5 * x * x) / Math.sqrt(2 * Math.PI);

// Upper tail for a >= 0: the series of Marsaglia (2004, "Evaluating the normal distribution") near the middle, and the
// continued fraction of Mills' ratio (Laplace) further out.
function upperTail(a) {
  if (a < 3) {
    let term = a;
    let sum = a;
    for (let k = 1; sum + term !== sum; k += 1) {
      term *= (a * a) / (2 * k + 1);
      sum += term;
    }
    return 0.5 - density(a) * sum;
  }
  let fraction = a;
  for (let k = 200; k > 0; k -= 1) fraction = a + k / fraction;
  return density(a) / fraction;
}

const cdf = (x) => (x < 0 ? upperTail(-x) : 1 - upperTail(x));

// Abramowitz and Stegun 26.2.23 for a start, then Halley's method on the distribution itself.
function quantile(p) {
  if (p <= 0) return -Infinity;
  if (p >= 1) return Infinity;
  if (p > 0.5) return -quantile(1 - p);
  const t = Math.sqrt(-2 * Math.log(p));
  let x = -(t - (2.515517 + t * (0.802853 + t * 0.010328)) / (1 + t * (1.432788 + t * (0.189269 + t * 0.001308))));
  for (let round = 0; round < 4; round += 1) {
    const step = (cdf(x) - p) / density(x);
    x -= step / (1 + (x * step) / 2);
  }
  return x;
}

// G_mu(alpha) = Phi(Phi^-1(1 - alpha) - |mu|), Dong, Roth and Su (2022); the power of the best test is its complement.
const typeTwoError = (alpha, mu) => cdf(-quantile(alpha) - Math.abs(mu));
const power = (alpha, mu) => cdf(quantile(alpha) + Math.abs(mu));
const superiority = (mu) => cdf(mu / Math.SQRT2);
function retrainings(mu, alpha = 0.05, wanted = 0.8) {
  const runs = 2 * ((quantile(wanted) - quantile(alpha / 2)) / mu) ** 2;
  return Number.isFinite(runs) ? Math.max(1, Math.ceil(runs)) : Infinity;
}
