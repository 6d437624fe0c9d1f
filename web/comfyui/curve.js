/**
 * What is known of a run, and how events change it. No page, no network: `node --test` reads this file as it is.
 *
 * @typedef {{step: number, loss: ?number, margin: ?number, chosen_mse: ?number, rejected_mse: ?number,
 *   learning_rate: ?number, peak_memory_bytes: ?number}} Point
 * @typedef {{step: number, accuracy: ?number, margin: ?number, base_accuracy: ?number}} Measure
 */

/** More points than this are merged to half as many, so that a long run stays quick to draw. */
export const MAX_POINTS = 1200;

const GOES_BACK = new Set(["run_started", "run_resumed", "rolled_back"]);
const ENDS = { run_finished: "finished", run_stopped: "stopped", run_failed: "failed" };
const MEANS = ["loss", "margin", "chosen_mse", "rejected_mse", "learning_rate"];

/** A run of which nothing is known but its name. */
export function emptyRun(name) {
  return {
    name,
    state: "created",
    alive: false,
    step: 0,
    steps: null,
    message: "",
    phase: null,
    seconds_left: null,
    seconds_per_step: null,
    pairs_per_step: null,
    peak_memory_bytes: null,
    device: null,
    lora: null,
    lora_copy: null,
    curve: [],
    evaluated: [],
    samples: [],
    checkpoints: [],
    warnings: [],
  };
}

/** The same from the server's answer; fields that an older server leaves out keep their defaults. */
export function runFromServer(detail) {
  return { ...emptyRun(detail.name), ...detail };
}

/** Events from lines of events.jsonl; a line that cannot be read is left out. */
export function parseLines(lines) {
  const events = [];
  for (const line of lines ?? []) {
    try {
      const event = typeof line === "string" ? JSON.parse(line) : line;
      if (event && typeof event.type === "string") events.push(event);
    } catch {
      // A partial last line is completed by a later message.
    }
  }
  return events;
}

/** Change `run` by one event. What a resume or a rollback has undone is dropped. */
export function applyEvent(run, event) {
  const step = event.step ?? run.step;
  if (GOES_BACK.has(event.type)) goBack(run, event.step ?? 0);
  if (event.steps) run.steps = event.steps;
  switch (event.type) {
    case "run_started":
    case "run_resumed":
      Object.assign(run, { state: "running", alive: true, message: "", phase: null, seconds_left: null });
      break;
    case "phase":
      applyPhase(run, event);
      break;
    case "step":
      applyStep(run, event);
      break;
    case "evaluated":
      replaceFrom(run.evaluated, {
        step,
        accuracy: event.accuracy ?? null,
        margin: event.margin ?? null,
        base_accuracy: event.base?.accuracy ?? null,
      });
      break;
    case "sample_saved":
      replaceFrom(run.samples, { step, path: event.path, prompts: event.prompts ?? [] });
      break;
    case "checkpoint_saved":
      run.checkpoints = [...run.checkpoints.filter((other) => other !== step), step];
      break;
    case "warning":
    case "memory_step_down":
      run.warnings.push({ step, message: event.message ?? "" });
      break;
    case "paused":
      if (run.state !== "stopping") run.state = "paused";
      run.message = event.message ?? "";
      run.phase = null;
      break;
    default:
      if (event.type in ENDS) applyEnd(run, event);
  }
  return run;
}

function applyPhase(run, event) {
  run.alive = true;
  if (event.phase === "stopping") run.state = "stopping";
  else if (run.state !== "stopping") run.state = "running";
  run.phase = { phase: event.phase, done: event.done ?? null, total: event.total ?? null };
  for (const name of ["pairs_per_step", "device", "method", "lora"]) {
    if (event[name] != null) run[name] = event[name];
  }
}

function applyStep(run, event) {
  run.alive = true;
  if (run.state !== "stopping") run.state = "running";
  run.phase = null;
  run.step = event.step;
  for (const name of ["seconds_left", "seconds_per_step", "peak_memory_bytes"]) run[name] = event[name] ?? null;
  const point = { step: event.step };
  for (const name of ["loss", "chosen_mse", "rejected_mse", "learning_rate", "peak_memory_bytes"]) {
    point[name] = event[name] ?? null;
  }
  const known = point.chosen_mse !== null && point.rejected_mse !== null;
  point.margin = known ? point.rejected_mse - point.chosen_mse : null;
  replaceFrom(run.curve, point);
  if (run.curve.length > MAX_POINTS) run.curve = thin(run.curve, MAX_POINTS / 2);
}

function applyEnd(run, event) {
  run.state = ENDS[event.type];
  run.alive = false;
  run.message = event.message ?? "";
  run.phase = null;
  run.seconds_left = null;
  if (event.step != null) run.step = event.step;
  if (event.lora) run.lora = event.lora;
}

function goBack(run, step) {
  for (const name of ["curve", "evaluated", "samples", "warnings"]) {
    run[name] = run[name].filter((entry) => (entry.step ?? 0) <= step);
  }
  run.checkpoints = run.checkpoints.filter((other) => other <= step);
  run.step = step;
}

/** Put an entry at its place; an event that is seen twice, from the history and live, counts once. */
function replaceFrom(entries, entry) {
  let at = entries.length;
  while (at > 0 && entries[at - 1].step > entry.step) at -= 1;
  const same = at > 0 && entries[at - 1].step === entry.step;
  entries.splice(same ? at - 1 : at, same ? 1 : 0, entry);
}

/**
 * At most `limit` points: means over neighbours, the highest memory, the last step.
 * @param {Point[]} points
 * @param {number} limit
 * @returns {Point[]}
 */
export function thin(points, limit) {
  const size = Math.max(1, Math.ceil(points.length / limit));
  if (size === 1) return points.slice();
  const thinned = [];
  for (let i = 0; i < points.length; i += size) {
    const part = points.slice(i, i + size);
    const memory = numbers(part, "peak_memory_bytes");
    const point = { step: part[part.length - 1].step, peak_memory_bytes: memory.length ? Math.max(...memory) : null };
    for (const name of MEANS) {
      const values = numbers(part, name);
      point[name] = values.length ? values.reduce((a, b) => a + b, 0) / values.length : null;
    }
    thinned.push(point);
  }
  return thinned;
}

/** The finite values of one field. */
export function numbers(entries, name) {
  return entries.map((entry) => entry[name]).filter((value) => Number.isFinite(value));
}

/**
 * A line through the noise: the mean over a window that follows the step, as wide as a twentieth of the curve.
 * @param {(?number)[]} values nulls are gaps
 * @returns {(?number)[]}
 */
export function smooth(values) {
  const reach = Math.max(1, Math.round(values.length / 40));
  return values.map((value, i) => {
    if (!Number.isFinite(value)) return null;
    const near = values.slice(Math.max(0, i - reach), i + reach + 1).filter((other) => Number.isFinite(other));
    return near.reduce((a, b) => a + b, 0) / near.length;
  });
}

/** Lowest and highest value that count: single outliers of a long curve do not flatten the rest. Null without values. */
export function extent(values) {
  const sorted = values.filter((value) => Number.isFinite(value)).sort((a, b) => a - b);
  if (!sorted.length) return null;
  const cut = sorted.length >= 40 ? Math.floor(sorted.length / 50) : 0;
  return [sorted[cut], sorted[sorted.length - 1 - cut]];
}

/** The extent with some room above and below, also for a flat line. */
export function padded(range) {
  if (!range) return [0, 1];
  const [low, high] = range;
  const room = (high - low) * 0.08 || Math.abs(high) * 0.1 || 1;
  return [low - room, high + room];
}

/** The entry whose step is nearest, or null. */
export function nearest(entries, step) {
  let best = null;
  for (const entry of entries) {
    if (best === null || Math.abs(entry.step - step) < Math.abs(best.step - step)) best = entry;
  }
  return best;
}

/** The last entry at or before a step, or null: a measure holds until the next one. */
export function lastUpTo(entries, step) {
  let found = null;
  for (const entry of entries) if (entry.step <= step) found = entry;
  return found;
}
