// Building elements. Strings become text, never markup: the page has no other way to insert them.

/** An element. `attributes`: class, on (event -> listener), style (property -> value), others as attributes. */
export function el(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "on") {
      for (const [event, listener] of Object.entries(value)) element.addEventListener(event, listener);
    } else if (name === "style") {
      for (const [property, set] of Object.entries(value)) element.style.setProperty(property, set);
    } else {
      element.setAttribute(name, value === true ? "" : value);
    }
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return element;
}

export const byId = (id) => document.getElementById(id);

/** Put `children` in the place of what `parent` holds. */
export function fill(parent, ...children) {
  parent.replaceChildren(...children.flat().filter((child) => child !== null && child !== undefined));
}

/** Set the text of an element, only when it has changed: what is selected or read aloud stays so. */
export function say(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/** A paragraph for where nothing is to be shown yet. */
export const empty = (text) => el("p", { class: "empty" }, text);
