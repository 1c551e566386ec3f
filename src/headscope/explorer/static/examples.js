/** Examples as the page uses them, from the columns of integers that a card brings. */

/**
 * @param {import("./types").Examples} columns @param {number} nHeads @param {number} bias
 * @returns {import("./types").Example[]}
 */
export function unpackExamples(columns, nHeads, bias) {
  const at = { src: 0, dfa: 0, att: 0, on: 0 };
  const take = (kind, n) => Array.from({ length: n }, () => at[kind]++);
  const dense = (kind, n, size) => {
    const values = Array(nHeads).fill(0);
    for (const i of take(kind, n)) values[columns[`${kind}_head`][i]] = columns[kind][i] * size;
    return values;
  };
  return (columns.dst ?? []).map((dst, i) => {
    const size = 10 ** columns.unit[i];
    const activation = columns.act[i] * size;
    const sources = take("src", columns.n_src[i]).map((row) => {
      const heads = dense("dfa", columns.n_dfa[row], size);
      const attention = dense("att", columns.n_att[row], 0.01);
      return { pos: dst - columns.offset[row], heads, dfa: total(heads) + columns.other[row] * size, other: columns.other[row] * size, attention };
    });
    const others = take("on", columns.n_on[i]).map((row) => [dst - columns.on_offset[row], columns.on[row] * size]);
    const rest = columns.rest.slice(i * nHeads, (i + 1) * nHeads).map((value) => value * size);
    const heads = rest.map((value, h) => value + total(sources.map((source) => source.heads[h])));
    return {
      block: columns.block[i], dst, activation, size, bias, sources, rest, heads, pre: columns.pre ? columns.pre[i] * size : activation,
      acts: new Map([...others, [dst, activation]]), brief: columns.brief[i] === 1,
    };
  });
}

export function total(values) {
  return values.reduce((sum, value) => sum + value, 0);
}

/** The sum of all DFA, and how far it and the bias are from the pre-activation: less than what rounding can make. */
export function checkDfa({ sources, heads, bias, pre, size }) {
  const dfa = total(heads);
  const residual = pre - (dfa + bias);
  return { shown: total(sources.map((source) => source.dfa)), dfa, residual, holds: Math.abs(residual) <= 1.2 * size };
}
