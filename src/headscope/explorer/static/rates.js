/** How well a score of features finds those with a verdict, at any threshold: counts, rates, intervals, the ROC curve. */

const Z = 1.959963984540054;

/** A proportion with its Wilson 95 % interval; nothing of nothing. @returns {[number, number, number]|null} value, low, high */
export function wilsonOf(k, n) {
  if (n === 0) return null;
  const p = k / n;
  const middle = (p + (Z * Z) / (2 * n)) / (1 + (Z * Z) / n);
  const half = (Z / (1 + (Z * Z) / n)) * Math.sqrt((p * (1 - p)) / n + (Z * Z) / (4 * n * n));
  return [p, k === 0 ? 0 : middle - half, k === n ? 1 : middle + half];
}

/** Which features the rule chooses, and how that agrees with the verdict; rows without a score are in neither. */
export function ratesAt({ score, verdict }, threshold) {
  const rows = [...score.keys()].filter((row) => score[row] !== null);
  const chosen = rows.filter((row) => score[row] >= threshold);
  const both = chosen.filter((row) => verdict[row]).length;
  const members = rows.filter((row) => verdict[row]).length;
  return {
    n: rows.length, chosen: chosen.length, members, both,
    precision: wilsonOf(both, chosen.length), recall: wilsonOf(both, members), base: wilsonOf(members, rows.length), selected: wilsonOf(chosen.length, rows.length),
    falseRate: rows.length > members ? (chosen.length - both) / (rows.length - members) : null,
  };
}

/** The corners of the ROC curve, from nothing chosen to all: the threshold, and the rates among members and others. */
export function rocOf({ score, verdict }) {
  const rows = [...score.keys()].filter((row) => score[row] !== null).sort((a, b) => score[b] - score[a]);
  const members = rows.filter((row) => verdict[row]).length;
  const [all, points] = [rows.length - members, [{ threshold: Infinity, x: 0, y: 0 }]];
  let both = 0;
  rows.forEach((row, i) => {
    both += verdict[row] ? 1 : 0;
    if (i + 1 < rows.length && score[rows[i + 1]] === score[row]) return;
    points.push({ threshold: score[row], x: (i + 1 - both) / Math.max(all, 1), y: both / Math.max(members, 1) });
  });
  return points.filter(({ x, y }, i) => i === 0 || i === points.length - 1 || !((points[i - 1].x === x && points[i + 1].x === x) || (points[i - 1].y === y && points[i + 1].y === y)));
}
