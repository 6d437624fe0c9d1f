/** What the page makes of a run's events, and how it words numbers; run by test_javascript.py, or `node --test`. */

import assert from "node:assert/strict";
import test from "node:test";

import {
  MAX_POINTS,
  applyEvent,
  emptyRun,
  extent,
  lastUpTo,
  nearest,
  padded,
  parseLines,
  runFromServer,
  smooth,
  thin,
} from "../../web/comfyui/curve.js";
import { accuracyText, ago, bytes, duration, facts, number, percent, rate, stateText } from "../../web/comfyui/format.js";

const step = (n, more = {}) => ({ type: "step", step: n, steps: 100, loss: 1 / n, chosen_mse: 0.2, rejected_mse: 0.3, ...more });
const after = (...events) => events.reduce(applyEvent, emptyRun("run"));

test("steps become points, with the margin that the server computes too", () => {
  const run = after({ type: "run_started", step: 0, steps: 100 }, step(1), step(2, { rejected_mse: null }));

  assert.equal(run.state, "running");
  assert.deepEqual([run.step, run.steps], [2, 100]);
  assert.deepEqual(run.curve.map((p) => p.loss), [1, 0.5]);
  assert.ok(Math.abs(run.curve[0].margin - 0.1) < 1e-12);
  assert.equal(run.curve[1].margin, null);
});

test("a resume drops what it has undone", () => {
  const run = after(
    { type: "run_started", step: 0, steps: 100 },
    ...[1, 2, 3, 4].map((n) => step(n)),
    { type: "evaluated", step: 2, accuracy: 0.5 },
    { type: "evaluated", step: 4, accuracy: 0.9 },
    { type: "sample_saved", step: 4, path: "samples/four.png" },
    { type: "checkpoint_saved", step: 4 },
    { type: "warning", step: 3, message: "late" },
    { type: "run_resumed", step: 2, steps: 100 },
    step(3, { loss: 7 }),
  );

  assert.deepEqual(run.curve.map((p) => [p.step, p.loss]), [[1, 1], [2, 0.5], [3, 7]]);
  assert.deepEqual(run.evaluated.map((p) => p.step), [2]);
  assert.deepEqual([run.samples, run.checkpoints, run.warnings], [[], [], []]);
});

test("an event that comes twice, in the history and live, counts once", () => {
  const run = after(step(1), step(2), step(2, { loss: 9 }), step(1, { loss: 8 }));

  assert.deepEqual(run.curve.map((p) => [p.step, p.loss]), [[1, 8], [2, 9]]);
});

test("stopping is not taken back by what the trainer still does", () => {
  const run = after(step(1), { type: "phase", step: 1, phase: "stopping" }, step(2), { type: "phase", phase: "writing the LoRA" });
  assert.equal(run.state, "stopping");

  applyEvent(run, { type: "run_stopped", step: 2, lora: "export/run.safetensors", message: "Stopped after step 2." });
  assert.deepEqual([run.state, run.alive, run.lora], ["stopped", false, "export/run.safetensors"]);
});

test("a pause ends with the next phase", () => {
  const run = after(step(1), { type: "paused", step: 1 });
  assert.equal(run.state, "paused");

  assert.equal(applyEvent(run, { type: "phase", step: 1, phase: "training" }).state, "running");
});

test("live events go on from what the server told", () => {
  const run = runFromServer({ name: "run", curve: [{ step: 10, loss: 1 }], evaluated: [], step: 10, steps: 100 });
  applyEvent(run, step(11));

  assert.deepEqual(run.curve.map((p) => p.step), [10, 11]);
  assert.deepEqual(run.samples, []);
});

test("a long run is thinned, and keeps its last step", () => {
  const run = emptyRun("run");
  for (let n = 1; n <= 5 * MAX_POINTS; n += 1) applyEvent(run, step(n));

  assert.ok(run.curve.length <= MAX_POINTS);
  assert.equal(run.curve.at(-1).step, 5 * MAX_POINTS);
});

test("thinning averages neighbours and keeps the highest memory", () => {
  const points = [1, 2, 3].map((n) => ({ step: n, loss: n === 2 ? null : n, peak_memory_bytes: 10 - n }));

  assert.deepEqual(thin(points, 3), points);
  const [point] = thin(points, 1);
  assert.deepEqual([point.step, point.loss, point.margin, point.peak_memory_bytes], [3, 2, null, 9]);
});

test("lines that cannot be read are left out", () => {
  assert.deepEqual(parseLines(['{"type":"step","step":1}', '{"type":"st', "null", { type: "paused" }]).map((e) => e.type), [
    "step",
    "paused",
  ]);
  assert.deepEqual(parseLines(undefined), []);
});

test("what is drawn: smooth lines, gaps, outliers, the nearest step", () => {
  assert.deepEqual(smooth([1, null, 3]), [1, null, 3]);
  assert.deepEqual(extent([...Array(100).fill(1), 2, 1000]), [1, 1]);
  assert.equal(extent([null, NaN]), null);
  assert.deepEqual(padded([2, 2]), [1.8, 2.2]);
  assert.deepEqual(padded(null), [0, 1]);
  const points = [{ step: 1 }, { step: 10 }];
  assert.equal(nearest(points, 4).step, 1);
  assert.equal(lastUpTo(points, 9).step, 1);
  assert.equal(lastUpTo(points, 0), null);
});

test("numbers as a person writes them", () => {
  assert.deepEqual([0, 4, 65, 3600 * 1.5, 86400 * 3].map(duration), ["0 s", "4 s", "1 min 05 s", "1 h 30 min", "3 d 0 h"]);
  assert.deepEqual([12e6, 8.5 * 1024 ** 3].map(bytes), ["11 MB", "8.5 GB"]);
  assert.deepEqual([0.028734, -0.1342, 12.345, 4321, 0, null].map(number), ["0.0287", "−0.134", "12.3", "4,321", "0", "–"]);
  assert.deepEqual([0.989, 0, null].map(percent), ["99%", "0%", "–"]);
  assert.equal(accuracyText({ accuracy: 0.9, base_accuracy: 0.5 }), "Held-out accuracy 90% (base 50%)");
  assert.equal(accuracyText({ accuracy: null }), "");
  assert.deepEqual([rate(8, 0.25), rate(8, 16), rate(8, 80), rate(null, 1), rate(8, 0)], ["32 pairs/s", "0.5 pairs/s", "6 pairs/min", "", ""]);
  assert.deepEqual([10, 400, 7300, 90000, 300000].map((s) => ago(1e9 - s, 1e9)), ["just now", "6 min ago", "2 h ago", "yesterday", "3 days ago"]);
});

test("the state and the facts of a run in words", () => {
  const run = after({ type: "run_started", step: 0, steps: 100 }, { type: "phase", phase: "ready", pairs_per_step: 8, device: "cuda:0" });
  assert.equal(stateText(run), "Training");
  applyEvent(run, step(40, { seconds_left: 30, seconds_per_step: 0.5, peak_memory_bytes: 8 * 1024 ** 3 }));
  assert.deepEqual(facts(run), ["Step 40 of 100", "30 s left", "16 pairs/s", "8.0 GB VRAM"]);

  applyEvent(run, { type: "phase", step: 40, phase: "measuring held-out pairs", done: 3, total: 24 });
  assert.equal(stateText(run), "Measuring held-out pairs 3 of 24");
  applyEvent(run, { type: "evaluated", step: 40, accuracy: 0.9, base: { accuracy: 0.5 } });
  assert.deepEqual(run.evaluated, [{ step: 40, accuracy: 0.9, margin: null, base_accuracy: 0.5 }]);

  applyEvent(run, { type: "run_failed", step: 40, message: "Out of memory." });
  assert.deepEqual([stateText(run), run.message], ["Failed", "Out of memory."]);
});
