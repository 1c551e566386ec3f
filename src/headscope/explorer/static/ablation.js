/** The tab "Ablation": what the loss does without the feature. */
import { drawColumns } from "./effects.js";
import { el } from "./dom.js";
import { empty, studyHead } from "./study.js";

export function drawAblation(effects, { columns, python, advice }, view, needs) {
  const own = columns.effects;
  const kept = drawColumns(columns, "effects", needs.vocab);
  if (effects === null) {
    const head = own && !own.refused && studyHead({
      definition: "Exact loss change by the direct path when the feature is removed, over the whole index, as `headscope effects` wrote it.", python: python.ablation, name: `ablation-${needs.feature.latent}`,
      rows: () => [["column", "value", "definition"], ...Object.entries(own.values).map(([name, value]) => [name, value, own.definitions[name]])],
    });
    return [head, ...(kept.length > 0 ? kept : [empty("This index has no loss effects yet.")]), el("p", { class: "definition", "data-advice": "" }, advice)];
  }
  return [...kept];
}
