// The three charts: hit ratio, tokens by tier, bytes moved.

import { Chart } from "./chart.js";
import { known, tierColour, variable } from "./colours.js";
import { byId } from "./dom.js";
import { amount, bytes, percent } from "./format.js";

const wholePercent = (ratio) => `${Math.round(100 * ratio)} %`;
const BINARY_STEPS = Array.from({ length: 50 }, (_, power) => 2 ** power);

export class Charts {
  constructor() {
    this.ratio = new Chart(byId("chart-ratio"), { title: "Hit ratio", format: percent, axis: wholePercent, max: 1 });
    this.tokens = new Chart(byId("chart-tokens"), {
      title: "Prompt tokens per second, by source",
      format: amount,
      stacked: true,
    });
    this.bytes = new Chart(byId("chart-bytes"), { title: "Bytes moved per second", format: bytes, steps: BINARY_STEPS });
    const scheme = matchMedia("(prefers-color-scheme: dark)");
    scheme.addEventListener("change", () => this.restyle());
  }

  draw(history) {
    const times = history.samples.map((sample) => sample.at);
    const tiers = known();
    const hits = tiers.map((name) => history.rates((sample) => sample.hits[name] ?? 0));
    const missed = history.rates((sample) => sample.asked - sample.hit).map((v) => v && Math.max(0, v));
    this.ratio.draw(times, ratioSeries(), [history.ratios()]);
    this.tokens.draw(times, tokenSeries(tiers), [...hits, missed]);
    this.bytes.draw(
      times,
      byteSeries(),
      ["retrieved", "stored", "read", "written"].map((name) => history.rates((sample) => sample[name])),
    );
  }

  restyle() {
    this.ratio.restyle(ratioSeries());
    this.tokens.restyle(tokenSeries(known()));
    this.bytes.restyle(byteSeries());
  }
}

const ratioSeries = () => [{ name: "of tokens asked for", colour: variable("--tier-0") }];

const tokenSeries = (tiers) => [
  ...tiers.map((name) => ({ name, colour: tierColour(name) })),
  { name: "missed", colour: variable("--missed") },
];

const byteSeries = () => [
  { name: "L1 to engine", colour: variable("--tier-0") },
  { name: "engine to L1", colour: variable("--tier-0"), dash: [6, 4], mark: "dashed" },
  { name: "read from tiers", colour: variable("--tier-1") },
  { name: "written to tiers", colour: variable("--tier-1"), dash: [6, 4], mark: "dashed" },
];
