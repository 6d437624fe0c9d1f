/** Small helpers for making elements. */

/**
 * An element with a class, attributes and children; `on...` attributes are listeners.
 * @returns {HTMLElement}
 */
export function make(tag, className = "", attributes = {}, ...children) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value != null) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child != null));
  return element;
}

/** A button with a text, and a longer explanation on hover. */
export function button(text, title, onClick) {
  return make("button", "mapo-button", { type: "button", title, onclick: onClick }, text);
}

/** Change a text only if it differs, so that a selection in it survives. */
export function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/** Keep the canvas under a node's widget from taking the pointer, the wheel and the keys that belong to the widget. */
export function keepEvents(element, ...kinds) {
  for (const kind of kinds) element.addEventListener(kind, (event) => event.stopPropagation());
}
