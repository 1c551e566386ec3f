/** A study's record as tables: every measure a row, every list of numbers a line. For tabs that have no script of their own. */
import { el } from "./dom.js";
import { empty, measureRows, measureTable, studyHead } from "./study.js";

const OF_PAGE = new Set(["latent", "corpus", "python"]);
const isMeasure = (value) => value !== null && typeof value === "object" && "definition" in value && "interval" in value;

/** Every measure of a record, and every other value, with the names that lead to it. */
function parts(name, value, measures, values) {
  if (isMeasure(value)) measures.push([name, name, value]);
  else if (value === null || typeof value !== "object" || (Array.isArray(value) && value.every((one) => one === null || typeof one !== "object"))) values.push([name, Array.isArray(value) ? value.join(", ") : String(value)]);
  else for (const [key, one] of Object.entries(value)) parts(name ? `${name} ${key.replaceAll("_", " ")}` : key.replaceAll("_", " "), one, measures, values);
}

/** Ask a study about the feature of a card, with the proxy of the view where there is one. @param {{name: string, question: string}} study */
export async function drawRecord({ name, question, options }, { data, feature }, { p }) {
  const found = await data.study(name, feature.latent, p && options.includes("proxy") ? { proxy: p } : {}).catch((error) => error);
  if (found instanceof Error) return [empty(found.message, " ", found.do ?? "")];
  const [measures, values] = [[], []];
  for (const [key, value] of Object.entries(found)) if (!OF_PAGE.has(key)) parts(key.replaceAll("_", " "), value, measures, values);
  const python = typeof found.python === "string" ? found.python : Object.values(found.python ?? {}).join("\n\n");
  return [studyHead({ definition: `${question} ${found.corpus}.`, python, name: `${name}-${found.latent}`, rows: () => [...measureRows(measures), [], ["name", "value"], ...values] }),
    measures.length > 0 && measureTable(measures),
    values.length > 0 && el("div", { class: "wide-table" }, el("table", { class: "measures", "data-values": "" }, values.map(([label, value]) => el("tr", {}, el("th", { scope: "row" }, label), el("td", {}, value)))))].filter(Boolean);
}
