// Numbers and times for people.

const LOCALE = "en";
const whole = new Intl.NumberFormat(LOCALE, { maximumFractionDigits: 0 });
const BINARY = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
const DECIMAL = ["", "k", "M", "G", "T"];

/** Three digits that tell something, without trailing zeros. */
function short(value) {
  const digits = value >= 100 ? 0 : value >= 10 ? 1 : 2;
  return String(Number(value.toFixed(digits)));
}

function scaled(value, base, units) {
  let power = 0;
  while (Math.abs(value) >= base * 0.9995 && power < units.length - 1) {
    value /= base;
    power += 1;
  }
  return [short(value), units[power]];
}

/** 1,234,567 */
export const count = (value) => whole.format(value);

/** 12.3 k, 4.56 M */
export function amount(value) {
  const [number, unit] = scaled(value, 1000, DECIMAL);
  return unit ? `${number} ${unit}` : number;
}

/** 1.5 GiB */
export const bytes = (value) => scaled(value, 1024, BINARY).join(" ");

/** 45.6 % */
export const percent = (ratio) => `${(100 * ratio).toFixed(ratio > 0 && ratio < 0.9995 ? 1 : 0)} %`;

/** 0.2 ms, 1.5 s, 3 min 20 s, 2 h 5 min, 3 d 4 h */
export function duration(seconds) {
  if (seconds < 0.9995) return `${short(1000 * seconds)} ms`;
  if (seconds < 60) return `${short(seconds)} s`;
  const [large, small, size] = seconds < 3600 ? ["min", "s", 60] : seconds < 86400 ? ["h", "min", 3600] : ["d", "h", 86400];
  const first = Math.floor(seconds / size);
  const part = size === 60 ? 1 : size / (size === 3600 ? 60 : 24);
  const rest = Math.floor((seconds % size) / part);
  return rest ? `${first} ${large} ${rest} ${small}` : `${first} ${large}`;
}

/** "now", "12 s ago", "3 min ago" */
export function ago(unixSeconds, now = Date.now() / 1000) {
  const seconds = Math.max(0, now - unixSeconds);
  if (seconds < 2) return "now";
  if (seconds < 60) return `${Math.floor(seconds)} s ago`;
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min ago`;
  if (seconds < 86400) return `${Math.floor(seconds / 3600)} h ago`;
  return `${Math.floor(seconds / 86400)} d ago`;
}

/** 12:03:05 */
export const clock = (unixSeconds) => new Date(1000 * unixSeconds).toLocaleTimeString("en-GB");
