// The figures of the last minutes, and what happened between them.

const MAX_SAMPLES = 300;

const sum = (byName) => Object.values(byName ?? {}).reduce((total, value) => total + value, 0);

/** Bytes that all tiers together read or wrote. */
const tierBytes = (totals, operation) =>
  Object.values(totals.tier_bytes ?? {}).reduce((total, by) => total + (by[operation] ?? 0), 0);

/** The counters that the page draws, from one answer of /stats. */
function counters(totals) {
  return {
    lookups: totals.lookups,
    asked: totals.lookup_tokens,
    hits: { ...totals.hit_tokens },
    hit: sum(totals.hit_tokens),
    saved: totals.saved_prefill_seconds,
    stored: totals.device_bytes.store,
    retrieved: totals.device_bytes.retrieve,
    read: tierBytes(totals, "read"),
    written: tierBytes(totals, "write"),
    faults: sum(totals.tier_errors),
    dropped: totals.stores_dropped + sum(totals.tier_write_drops),
  };
}

/** A ring of samples. A server that was restarted counts from zero: then the ring begins anew. */
export class History {
  constructor() {
    this.samples = [];
  }

  add(stats, at = Date.now() / 1000) {
    const sample = { at, ...counters(stats.totals) };
    const last = this.samples.at(-1);
    if (last && (sample.lookups < last.lookups || sample.asked < last.asked)) this.samples = [];
    this.samples.push(sample);
    if (this.samples.length > MAX_SAMPLES) this.samples.shift();
  }

  get last() {
    return this.samples.at(-1);
  }

  /** Per second, of counter `of(sample)`, between neighbours; null for the first. */
  rates(of) {
    return this.samples.map((sample, i) => {
      const before = this.samples[i - 1];
      return before ? (of(sample) - of(before)) / Math.max(0.001, sample.at - before.at) : null;
    });
  }

  /** Hit tokens over tokens asked for, between neighbours; null where nothing was asked. */
  ratios() {
    return this.samples.map((sample, i) => {
      const before = this.samples[i - 1];
      const asked = before ? sample.asked - before.asked : 0;
      return asked > 0 ? (sample.hit - before.hit) / asked : null;
    });
  }

  /** What has been added to each counter in the last `seconds`, with the seconds that this covers; null without two samples. */
  since(seconds) {
    const last = this.last;
    const first = this.samples.find((sample) => last.at - sample.at <= seconds);
    if (!last || first === last) return null;
    const added = { seconds: last.at - first.at };
    for (const [name, value] of Object.entries(last)) {
      if (typeof value === "number") added[name] = value - first[name];
    }
    return added;
  }
}
