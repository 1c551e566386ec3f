/** Building blocks of the page. Text only ever becomes a text node: nothing from a corpus is parsed as HTML. */

/**
 * Make an element. `vars` sets CSS custom properties, `onclick` and its like add listeners, the rest are attributes;
 * null, undefined and false leave an attribute or a child out.
 */
export function el(tag, props = {}, ...children) {
  return furnish(document.createElement(tag), props, children);
}

/** The same for SVG. */
export function svg(tag, props = {}, ...children) {
  return furnish(document.createElementNS("http://www.w3.org/2000/svg", tag), props, children);
}

export function button(props, ...children) {
  return el("button", { type: "button", ...props }, ...children);
}

const given = (value) => value !== null && value !== undefined && value !== false;

function furnish(node, props, children) {
  for (const [key, value] of Object.entries(props)) {
    if (!given(value)) continue;
    if (key === "vars") setVars(node, value);
    else if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else node.setAttribute(key, value === true ? "" : value);
  }
  node.append(...children.flat(Infinity).filter(given));
  return node;
}

/** Set CSS custom properties; a policy that forbids style attributes allows this. */
export function setVars(node, vars) {
  for (const [name, value] of Object.entries(vars)) node.style.setProperty(name, value);
}

/** Give text to the reader as a file. */
export function download(name, type, text) {
  const url = URL.createObjectURL(new Blob([text], { type }));
  el("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 1000);
}

/** A number from 0 to 1 for CSS. */
export function unit(value) {
  return Math.max(0, Math.min(value, 1)).toFixed(3);
}

/** A term whose definition shows on hover. */
export function term(text, definition, tag = "span") {
  return el(tag, { class: "term", title: definition || null }, text);
}

/** Mutually exclusive choices. @param {[string, string, string?][]} options value, label, title */
export function choice(name, options, current, pick) {
  return el("span", { class: "choice", role: "group", "aria-label": name }, options.map(([value, label, title]) =>
    button({ "data-choice": `${name}:${value}`, "aria-pressed": String(value === current), title, onclick: () => pick(value) }, label)));
}

/** A button that shows all of a list whose rows after the first `few` have the class "more"; false where there are none. */
export function more(list, name, few, all) {
  const toggle = button({
    class: "quiet", "data-more": name, "aria-expanded": "false",
    onclick: () => {
      const open = list.classList.toggle("open");
      toggle.setAttribute("aria-expanded", String(open));
      toggle.textContent = `show ${open ? few : all}`;
    },
  }, `show ${all}`);
  return all > few && toggle;
}
