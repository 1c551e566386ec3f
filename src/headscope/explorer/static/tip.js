/** The tooltip: follows what is hovered, stays when pinned so that its numbers can be read and copied. */
import { el } from "./dom.js";

export class Tip {
  #box = el("div", { class: "tip", role: "tooltip", "data-tip": "", hidden: true });
  pinned = false;

  constructor(host) {
    host.append(this.#box);
  }

  /** Show `content` beside `anchor`; a pinned tip gives way to another pin only. */
  show(anchor, content, pin = false) {
    if (this.pinned && !pin) return;
    this.pinned = pin;
    this.#box.classList.toggle("pinned", pin);
    this.#box.replaceChildren(...content);
    if (pin) this.#box.append(el("div", { class: "hint" }, "pinned · Esc closes"));
    this.#box.hidden = false;
    const [at, box] = [anchor.getBoundingClientRect(), this.#box.getBoundingClientRect()];
    const below = at.bottom + 8 + box.height < innerHeight || at.top < box.height + 8;
    const most = document.documentElement.clientWidth - box.width - 8;
    this.#box.style.left = `${scrollX + Math.max(8, Math.min(at.left + (at.width - box.width) / 2, most))}px`;
    this.#box.style.top = `${scrollY + (below ? at.bottom + 8 : at.top - box.height - 8)}px`;
  }

  /** Listeners for an element that shows `content()` while it is hovered or has the focus. */
  on(content) {
    const show = (event) => this.show(event.currentTarget, content());
    const leave = () => this.leave();
    return { onpointerenter: show, onfocus: show, onpointerleave: leave, onblur: leave };
  }

  /** Hide what only hovers. */
  leave() {
    if (!this.pinned) this.hide();
  }

  /** Hide whatever shows. @returns {boolean} whether it was pinned */
  hide() {
    const was = this.pinned;
    this.pinned = false;
    this.#box.hidden = true;
    return was;
  }

  contains(node) {
    return this.#box.contains(node);
  }
}
