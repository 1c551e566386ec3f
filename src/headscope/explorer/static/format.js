/** Numbers as text: one way each, with a true minus sign. */

const whole = new Intl.NumberFormat("en-US");
const lacks = (value) => value === null || value === undefined;

/** 1234567 -> "1,234,567" */
export function int(value) {
  return lacks(value) ? "–" : whole.format(value);
}

/** An activation, logit or contribution. */
export function num(value, digits = 3) {
  if (lacks(value)) return "–";
  const size = Math.abs(value);
  const text = size.toFixed(size >= 1000 ? 0 : size >= 100 ? 1 : digits);
  return (value < 0 && Number(text) !== 0 ? "−" : "") + text;
}

/** The same with its sign always shown. */
export function signed(value, digits = 3) {
  const text = num(value, digits);
  return /^[−–]/.test(text) ? text : `+${text}`;
}

/** A share: 0.000423 -> "0.042 %", 0.7213 -> "72.1 %" */
export function pct(value) {
  if (lacks(value)) return "–";
  const size = Math.abs(value * 100);
  const text = size > 0 && size < 0.001 ? sci(size) : size > 0 && size < 0.1 ? String(Number(size.toPrecision(2))) : size.toFixed(size === 0 || size >= 99.95 ? 0 : size >= 1 ? 1 : 2);
  return `${value < 0 ? "−" : ""}${text}\u202f%`;
}

/** 0.0000002 -> "2e-7" */
export function sci(value, digits = 0) {
  return value === 0 ? "0" : value.toExponential(digits).replace(/^-/, "−");
}

/** About `n` round numbers from 0 to `max`. */
export function ticks(max, n) {
  if (!(max > 0)) return [0];
  const power = 10 ** Math.floor(Math.log10(max / n));
  const step = [1, 2, 2.5, 5, 10].map((factor) => factor * power).find((size) => size >= 0.999 * max / n);
  return Array.from({ length: Math.floor(max / step + 1e-4) + 1 }, (_, i) => Number((i * step).toPrecision(12)));
}

/** A tick's label: 1200 -> "1.2k" */
export function short(value) {
  const [size, letter] = value >= 1e6 ? [1e6, "M"] : value >= 1e3 ? [1e3, "k"] : [1, ""];
  return Number((value / size).toPrecision(3)) + letter;
}
