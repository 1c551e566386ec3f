/** The keyboard: one table of keys, from which the help page is drawn too. */
import { el } from "./dom.js";

/** @typedef {{keys: string[], label?: string, help: string, run: (event: KeyboardEvent) => void}} Binding */

/** Listen for keys, except while something is typed or asked. @param {Binding[]} bindings */
export function bindKeys(bindings) {
  document.addEventListener("keydown", (event) => {
    const binding = bindings.find(({ keys }) => keys.includes(event.key));
    if (!binding || event.ctrlKey || event.metaKey || event.altKey || event.defaultPrevented) return;
    if (document.querySelector("dialog[open]")) return;
    if (event.key !== "Escape" && (event.target.closest("input, select, textarea") || (event.key === "Enter" && event.target.closest("button, a")))) return;
    if (event.key !== "Escape") event.preventDefault();
    binding.run(event);
  });
}

/** The help page. @param {Binding[]} bindings */
export function helpDialog(bindings) {
  const dialog = el("dialog", { class: "help", "data-help": "", onclick: ({ target }) => target === dialog && dialog.close() }, el("h2", {}, "Keys"),
    el("dl", {}, bindings.flatMap(({ keys, label, help }) => [
      el("dt", {}, (label ?? keys.join(" ")).split(" ").map((key) => el("kbd", {}, key))), el("dd", {}, help)])),
    el("p", { class: "hint" }, "Hover shows exact numbers; a click pins them."));
  return dialog;
}

/** Ask for a latent's number. @param {number} dSae @param {(latent: number) => void} open */
export function askLatent(dSae, open) {
  const input = el("input", { inputmode: "numeric", placeholder: `0 to ${dSae - 1}`, "data-goto": "" });
  const dialog = el("dialog", { class: "goto", onclose: () => dialog.remove() }, el("label", {}, "Go to feature ", input));
  input.addEventListener("keydown", (event) => {
    if (event.key !== "Enter") return;
    const valid = /^\d+$/.test(input.value.trim()) && Number(input.value) < dSae;
    input.setAttribute("aria-invalid", String(!valid));
    if (!valid) return;
    dialog.close();
    open(Number(input.value));
  });
  document.body.append(dialog);
  dialog.showModal();
}
