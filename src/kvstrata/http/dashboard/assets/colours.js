// One colour and one word for each tier, everywhere on the page.

const NUM_COLOURS = 6;
const order = [];

/** Fix the order of the tiers: the first colour is L1's. */
export function know(names) {
  for (const name of names) if (!order.includes(name)) order.push(name);
}

export const known = () => [...order];

/** The class that gives an element the colour of a tier. */
export function tierClass(name) {
  know([name]);
  return `tier-${order.indexOf(name) % NUM_COLOURS}`;
}

/** The colour itself, for canvases. */
export function tierColour(name) {
  know([name]);
  return variable(`--tier-${order.indexOf(name) % NUM_COLOURS}`);
}

export const variable = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
