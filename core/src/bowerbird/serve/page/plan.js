// Before an upgrade: the plan, what it advises, and the form that starts one.

import { button, capital, count, decimal, duration, el, empty, failure, fill, icon, percent, sentence } from "./dom.js";
import { lineName, short } from "./names.js";

const POLL = 1000; // milliseconds between two looks at a plan that is being made

/** `act(path, body, done, by)` sends what changes the upgrade; `changed()` is called when another line or plan is chosen;
 *  `spent(plan)`: it was followed to its end already. Gives `root`, `beside` (a column with room below the form), and
 *  `show`, `load`, `plan`, `lineOf`, `startButton`, `close`. */
export function planning(context, { act, changed, spent }) {
  const { api, toast, confirm } = context;
  const root = el("div", { class: "start", hidden: true });
  const beside = el("div", { class: "stack" });
  let job = null;
  let timer = null;
  let over = false;

  const form = {
    candidate: el("select", { data: { testid: "start-candidate" }, on: { change: () => (showPlan(), changed()) } }),
    label: el("select", { data: { testid: "start-label" } }),
    sample: el("input", { type: "number", min: "10", max: "100000", step: "1", value: "1000", inputmode: "numeric", data: { testid: "start-sample" } }),
    strategy: el("select", { data: { testid: "start-strategy" }, on: { change: () => changed() } }),
    rate: el("input", { type: "number", min: "0.1", step: "any", placeholder: "as many as it can", inputmode: "decimal", data: { testid: "start-rate" } }),
    flips: el("input", { type: "number", min: "0", max: "100", step: "any", placeholder: "no limit", inputmode: "decimal", data: { testid: "start-flips" } }),
  };
  const planButton = button("Plan", () => planIt(), { kind: "primary", data: { testid: "plan-start" } });
  const startButton = button("Start the upgrade", () => startIt(), { data: { testid: "upgrade-start" } });
  const starting = el("span", { class: "muted small-text", hidden: true }, "Loading the new encoder and freezing the queries to watch\u2026");
  const advice = el("div", { class: "stack advice", "aria-live": "polite", data: { testid: "plan" } });
  const field = (label, input, hint = null, more = "") => el("label", { class: `field ${more}`.trim() }, el("span", {}, label), input, hint && el("span", { class: "muted hint" }, hint));
  const running = el("div", { class: "notice", data: { testid: "plan-running" } });
  const step = el("p", { class: "small-text" });
  let offered = "";

  /** `busy`: an answer is awaited, by the button `acting`. */
  function show({ busy, acting }) {
    const { candidates, metadata_keys: keys, label_key: key } = context.gallery;
    const offer = JSON.stringify([candidates, keys, key]);
    if (offer !== offered) {
      offered = offer;
      if (candidates.length === 0) {
        fill(root, el("section", { class: "panel" }, empty({ symbol: "upgrade", title: "No encoder to move to", text: "Start the service with one: bowerbird serve GALLERY --candidate NAME=ENCODER. A path is never taken from a page." })));
        return;
      }
      fill(form.candidate, candidates.map((name) => el("option", { value: name }, name)));
      const { spaces, serving } = context.gallery;
      const encoder = spaces.find((space) => space.fingerprint === serving)?.encoder;
      form.candidate.value = candidates.includes(job?.candidate) ? job.candidate : (candidates.find((name) => name !== encoder) ?? candidates[0]);
      const all = [...new Set([key, ...(keys ?? [])].filter(Boolean))];
      fill(form.label, !key && el("option", { value: "" }, "none"), all.map((name) => el("option", { value: name }, name)));
      form.label.value = key ?? "";
      fill(
        root,
        el(
          "section",
          { class: "panel stack", "aria-label": "Plan" },
          el("div", { class: "stack tight" }, el("h2", {}, "Plan"), el("p", { class: "muted small-text" }, "Measures both encoders on a sample and forecasts every way to move. Changes nothing.")),
          el("div", { class: "fields" }, field("To the encoder", form.candidate), field("Label in the metadata", form.label, "For quality and flips."), field("Items in the sample", form.sample)),
          planButton,
          advice,
        ),
        beside,
      );
      fill(
        beside,
        el(
          "section",
          { class: "panel stack", "aria-label": "Start" },
          el("div", { class: "stack tight" }, el("h2", {}, "Start"), el("p", { class: "muted small-text" }, "Searches go on all the time. Until you finish, you can go back to the exact old state.")),
          el(
            "div",
            { class: "fields" },
            field("Strategy", form.strategy, null, "wide"),
            field("Most items per second", form.rate, "Fewer leave more of the machine to searches."),
            field("Pause above negative flips, %", form.flips, "First results that were right and become wrong."),
          ),
          el("div", { class: "row" }, startButton, starting),
        ),
      );
      showPlan();
    }
    planButton.disabled = busy;
    starting.hidden = !(busy && acting === startButton);
    startButton.disabled = busy || job?.state === "running";
  }

  /** The plan for the chosen encoder that can still be followed. */
  function offeredPlan() {
    const plan = job?.plan ?? null;
    if (plan === null || (plan.candidate !== null && plan.candidate !== form.candidate.value)) return null;
    return spent(plan) ? null : plan;
  }

  function chosenLine(plan) {
    return form.strategy.value === "" ? null : (plan.lines[Number(form.strategy.value)] ?? null);
  }

  /** The line that is chosen, else the recommended one; null where there is neither. */
  const lineOf = (plan) => chosenLine(plan) ?? plan.lines.find((line) => line.recommended) ?? null;

  const startable = (line) => !["do-not-upgrade", "switch-now"].includes(short(line.strategy));

  function showPlan() {
    const plan = offeredPlan();
    const picked = form.strategy.value;
    planButton.lastChild.textContent = plan ? "Plan again" : "Plan";
    planButton.hidden = job?.state === "running";
    fill(
      form.strategy,
      el("option", { value: "" }, plan?.lines.some((line) => line.recommended) ? "as the plan recommends" : "default"),
      (plan?.lines ?? []).flatMap((line, place) => (startable(line) ? [el("option", { value: place }, lineName(line) + (line.recommended ? " (recommended)" : ""))] : [])),
    );
    if ([...form.strategy.options].some((option) => option.value === picked)) form.strategy.value = picked;
    const clear = plan?.lines.some((line) => line.recommended && startable(line));
    startButton.classList.toggle("primary", Boolean(clear));
    planButton.classList.toggle("primary", !clear);
    if (job?.state === "running") {
      step.textContent = capital(job.step ?? "");
      if (running.isConnected) return; // the button that cancels keeps the focus
      fill(
        running,
        el("span", { class: "spinner", "aria-hidden": "true" }),
        el("div", { class: "grow" }, el("strong", {}, `Planning the move to ${job.candidate}`), step),
        button("Cancel", () => cancelPlan(), { data: { testid: "plan-cancel" } }),
      );
      fill(advice, running);
    } else if (job?.state === "failed") {
      fill(advice, failure({ title: "The plan failed", message: job.error ?? "" }));
    } else if (plan) {
      fill(advice, planOf(plan));
    } else {
      fill(advice);
    }
  }

  function planOf(plan) {
    const good = /^upgrade/i.test(plan.recommendation);
    const at = (line, share) => {
      const place = line.shares.findIndex((x) => Math.abs(x - share) < 1e-6);
      return place < 0 ? "" : decimal(line.quality[place]);
    };
    const most = (line) => (line.nfr ? percent(Math.max(...line.nfr)) : "");
    return [
      el(
        "div",
        { class: `notice ${good ? "right" : ""}`, data: { testid: "plan-recommendation" } },
        icon(good ? "check" : "alert"),
        el("div", { class: "grow" }, el("strong", {}, adviceOf(plan)), foreseen(plan), el("details", { class: "small-text", open: !good }, el("summary", {}, "Why, in numbers"), sentence(plan.reason))),
      ),
      el(
        "dl",
        { class: "facts number" },
        fact("Time of one worker", plan.hours === null ? null : duration(3600 * plan.hours)),
        fact("Price", plan.price ? plan.price.toFixed(2) : null),
        fact("Made", `${duration(Math.max(1, Date.now() / 1000 - plan.created_at))} ago`),
      ),
      el(
        "div",
        { class: "table-scroll" },
        el(
          "table",
          { class: "table number", data: { testid: "plan-lines" } },
          el("caption", { class: "hidden-text" }, "Forecast of quality by the share of moved items, and the largest share of negative flips on the way"),
          el("thead", {}, el("tr", {}, ["Strategy", "0\u00a0%", "50\u00a0%", "100\u00a0%", "most flips"].map((name) => el("th", { scope: "col" }, name)))),
          el(
            "tbody",
            {},
            sorted(plan.lines).map((line) =>
              el("tr", { class: line.recommended ? "recommended" : null }, el("th", { scope: "row" }, lineName(line), line.recommended && el("span", { class: "badge right" }, "recommended")), el("td", {}, at(line, 0)), el("td", {}, at(line, 0.5)), el("td", {}, at(line, 1)), el("td", {}, most(line))),
            ),
          ),
        ),
      ),
    ];
  }

  /** What happens to quality, in one sentence. */
  function foreseen({ old_quality: now, new_quality: then, lines }) {
    if (now === null || then === null) return null;
    const flips = lines.find((line) => line.recommended)?.nfr;
    const cost = flips ? `; on the way at most ${percent(Math.max(...flips))} of the first results become wrong` : "";
    return el("p", { class: "small-text" }, `Quality is ${decimal(now)} now and ${decimal(then)} when all have moved${cost}.`);
  }

  function adviceOf(plan) {
    const line = plan.lines.find((one) => one.recommended);
    if (plan.recommendation === "upgrade") {
      if (!line) return "Upgrade";
      return short(line.strategy) === "full" ? "Upgrade: encode everything, then switch" : `Upgrade by ${lineName(line)}`;
    }
    return { "do-not-upgrade": "Do not upgrade", "no-verdict": "No verdict" }[plan.recommendation] ?? capital(plan.recommendation);
  }

  /** The recommended line first, then by the area below the curve. */
  function sorted(lines) {
    const area = ({ shares, quality }) => shares.slice(1).reduce((sum, x, place) => sum + ((x - shares[place]) * (quality[place] + quality[place + 1])) / 2, 0);
    return [...lines].sort((a, b) => b.recommended - a.recommended || area(b) - area(a));
  }

  async function load() {
    clearTimeout(timer);
    try {
      job = await api.get("/v1/upgrade/plan");
    } catch (error) {
      if (job?.state !== "running") return;
      job = { ...job, state: "failed", error: error.message };
    }
    if (over) return;
    if (offered) showPlan();
    changed();
    if (job.state === "running") timer = setTimeout(load, POLL);
  }

  async function planIt() {
    if (!form.sample.reportValidity()) return;
    planButton.disabled = true;
    try {
      job = await api.post("/v1/upgrade/plan", { candidate: form.candidate.value, label_key: form.label.value || null, sample: Number(form.sample.value) });
      showPlan();
      timer = setTimeout(load, POLL / 2);
    } catch (error) {
      toast(error.message, "wrong");
    } finally {
      planButton.disabled = false;
    }
  }

  async function cancelPlan() {
    try {
      job = await api.post("/v1/upgrade/plan/cancel", {});
    } catch (error) {
      toast(error.message, "wrong");
    }
    showPlan();
  }

  async function startIt() {
    if (!form.rate.reportValidity() || !form.flips.reportValidity()) return;
    const plan = offeredPlan();
    const line = plan ? lineOf(plan) : null;
    const candidate = form.candidate.value;
    const items = context.gallery.items;
    const against = plan && !/^upgrade/i.test(plan.recommendation);
    const time = plan?.hours ? ` One worker needs about ${duration(Math.max(3600 * plan.hours, form.rate.value ? items / Number(form.rate.value) : 0))}.` : "";
    const text = [
      against && `The plan does not recommend this: ${plan.reason}\n\n`,
      !plan && "There is no plan for this encoder: what it does to quality is not known.\n\n",
      `A background worker encodes ${count(items, "item")} by ${candidate}${line ? ` and serves them by ${lineName(line)}` : ""}.${time} Searches go on. Nothing is dropped before you finish, and you can roll back until then.`,
    ].filter(Boolean).join("");
    if (!(await confirm({ title: `Move ${context.gallery.name} to ${candidate}?`, text, action: "Start", danger: Boolean(against) }))) return;
    const picked = plan ? chosenLine(plan) : null;
    await act("/v1/upgrade/start", {
      candidate,
      strategy: picked?.strategy ?? null,
      merger: picked?.merger || null,
      label_key: form.label.value || null,
      rate: form.rate.value ? Number(form.rate.value) : null,
      max_nfr: form.flips.value ? Number(form.flips.value) / 100 : null,
    }, null, startButton);
  }

  return {
    root,
    beside,
    startButton,
    show,
    load,
    plan: offeredPlan,
    lineOf,
    close: () => {
      over = true;
      clearTimeout(timer);
    },
  };
}

const fact = (name, value) => (value === null ? null : [el("dt", {}, name), el("dd", {}, value)]);
