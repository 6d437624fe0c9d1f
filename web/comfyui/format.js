/** Numbers and states in words. No page, no network: `node --test` reads this file as it is. */

const STATES = {
  created: "Not started",
  running: "Training",
  paused: "Paused",
  stopping: "Stopping",
  finished: "Finished",
  stopped: "Stopped",
  failed: "Failed",
  interrupted: "Interrupted",
};

/** "45 s", "2 min 05 s", "1 h 20 min", "3 d 4 h". */
export function duration(seconds) {
  if (!Number.isFinite(seconds)) return "";
  const s = Math.max(0, Math.round(seconds));
  const two = (n) => String(n).padStart(2, "0");
  if (s < 60) return `${s} s`;
  if (s < 3600) return `${Math.floor(s / 60)} min ${two(s % 60)} s`;
  const minutes = Math.round(s / 60);
  if (minutes < 48 * 60) return `${Math.floor(minutes / 60)} h ${two(minutes % 60)} min`;
  const hours = Math.round(s / 3600);
  return `${Math.floor(hours / 24)} d ${hours % 24} h`;
}

/** "640 MB", "7.9 GB"; as graphics cards are sold, 1 GB is 1024 MB. */
export function bytes(count) {
  if (!Number.isFinite(count)) return "";
  const mb = count / 1024 ** 2;
  return mb < 1000 ? `${Math.round(mb)} MB` : `${(mb / 1024).toFixed(1)} GB`;
}

/** Three significant digits, without an exponent where a person would not write one. */
export function number(value) {
  if (!Number.isFinite(value)) return "–";
  const size = Math.abs(value);
  if (size === 0) return "0";
  if (size < 1e-4 || size >= 1e6) return value.toExponential(1);
  if (size >= 1000) return Math.round(value).toLocaleString("en-US");
  const text = value.toFixed(Math.min(6, Math.max(0, 2 - Math.floor(Math.log10(size)))));
  return text.replace("-", "−");
}

/** "97%". */
export function percent(share) {
  return Number.isFinite(share) ? `${Math.round(share * 100)}%` : "–";
}

/** "31 pairs/s", "0.4 pairs/s", "7 pairs/min". */
export function rate(pairs, seconds) {
  if (!(pairs > 0) || !(seconds > 0)) return "";
  const perSecond = pairs / seconds;
  if (perSecond >= 10) return `${Math.round(perSecond)} pairs/s`;
  if (perSecond >= 0.2) return `${perSecond.toFixed(1)} pairs/s`;
  return `${Number((perSecond * 60).toPrecision(2))} pairs/min`;
}

/** "just now", "5 min ago", "3 h ago", "2 days ago", or the date. */
export function ago(time, now = Date.now() / 1000) {
  if (!Number.isFinite(time)) return "";
  const s = now - time;
  if (s < 60) return "just now";
  if (s < 3600) return `${Math.floor(s / 60)} min ago`;
  if (s < 86400) return `${Math.floor(s / 3600)} h ago`;
  const days = Math.floor(s / 86400);
  if (days <= 14) return days === 1 ? "yesterday" : `${days} days ago`;
  return new Date(time * 1000).toISOString().slice(0, 10);
}

/** What a run is doing, in a few words. */
export function stateText(run) {
  const { phase, done, total } = run.phase ?? {};
  const busy = run.state === "running" && phase && !["training", "ready", "saved"].includes(phase);
  if (!busy) return STATES[run.state] ?? run.state;
  const text = phase.charAt(0).toUpperCase() + phase.slice(1);
  return total ? `${text} ${done} of ${total}` : text;
}

/** Share of the steps that are done, 0-1. */
export function progress(run) {
  return run.steps > 0 ? Math.min(1, run.step / run.steps) : 0;
}

/** The facts under the bar: step, time left, speed, memory. */
export function facts(run) {
  const list = [];
  if (run.steps) list.push(`Step ${run.step} of ${run.steps}`);
  if (run.alive && run.step > 0) {
    if (Number.isFinite(run.seconds_left) && run.step < run.steps) list.push(`${duration(run.seconds_left)} left`);
    const speed = rate(run.pairs_per_step, run.seconds_per_step);
    if (speed) list.push(speed);
  }
  if (run.peak_memory_bytes) {
    list.push(`${bytes(run.peak_memory_bytes)} ${String(run.device).startsWith("cuda") ? "VRAM" : "memory"}`);
  }
  return list;
}

/** "Held-out accuracy 97% (base 12%)", or nothing before the first measure. */
export function accuracyText({ accuracy, base_accuracy: base }) {
  if (!Number.isFinite(accuracy)) return "";
  return `Held-out accuracy ${percent(accuracy)}${Number.isFinite(base) ? ` (base ${percent(base)})` : ""}`;
}
