"use strict";
// The what-if controls. The formulas are those of ksm.plan.outlook.what_if; a test compares the two.

// Linear between the points of an ascending grid, held at its ends.
ksm.interpolate = (x, grid, values) => {
  let right = grid.findIndex((at) => at >= x);
  if (right < 0) return values[values.length - 1];
  if (right === 0 || grid[right] === x) return values[right];
  const part = (x - grid[right - 1]) / (grid[right] - grid[right - 1]);
  return values[right - 1] + part * (values[right] - values[right - 1]);
};

// Seconds that so many visits take, at so many CPU seconds each, sleeps included.
ksm.wall = (visits, cpuEach, pagesToScan, sleepMillisecs, hz) => {
  const batch = cpuEach * pagesToScan;
  const ticks = Math.ceil((sleepMillisecs * hz) / 1000);
  const period = ticks === 0 ? batch : (Math.floor(batch * hz + 1e-9) + ticks + 1) / hz;
  return (visits / pagesToScan) * period;
};

// The largest number of VMs up to which all need no more than the limit.
ksm.most = (grid, values, limit) => {
  const k = values.findIndex((value) => value > limit);
  if (k < 0) return grid[grid.length - 1];
  if (k === 0) return 0;
  const step = (limit - values[k - 1]) / (values[k] - values[k - 1]);
  return grid[k - 1] + Math.floor(step * (grid[k] - grid[k - 1]) + 1e-9);
};

// Until 99 % are merged from cold, ksmd's share of a CPU until then, and once all is settled.
ksm.paced = (host, vms, pagesToScan) => {
  const { outlook, vms: grid } = host;
  if (vms === 0) return { settle: 0, cpu_cold: 0, cpu_steady: 0 };
  const points = [...grid.filter((n) => n < vms), vms];
  const at = (values) => points.map((n) => ksm.interpolate(n, grid, values));
  const wall = (visits, each) => ksm.wall(visits, each, pagesToScan, host.sleep_millisecs, outlook.hz);
  const [pages, sharing, merging] = [at(outlook.pages), at(outlook.sharing), at(outlook.merging_cpu)];
  const last = points.length - 1;
  let seconds = wall(pages[last], outlook.hashing_cpu);
  let busy = pages[last] * outlook.hashing_cpu;
  const time = [0, seconds], work = [0, busy], merged = [0, sharing[0]];
  for (let k = 1; k <= last; k++) {
    const visits = Math.max(pages[k] - pages[k - 1], 1e-9);
    const cpu = merging[k] - merging[k - 1];
    time.push((seconds += wall(visits, cpu / visits)));
    work.push((busy += cpu));
    merged.push(sharing[k]);
  }
  const goal = 0.99 * sharing[last];
  let end = 0;
  if (goal > 0) {
    const after = merged.findIndex((value) => value >= goal * (1 - 1e-12));
    const before = Math.max(after - 1, 0);
    const gained = merged[after] - merged[before];
    end = time[before] + (gained > 0 ? (goal - merged[before]) / gained : 1) * (time[after] - time[before]);
  }
  end = end || time[time.length - 1];
  const settled = (visits, cpu) => {
    const [n, c] = [visits, cpu].map((values) => ksm.interpolate(vms, grid, values));
    return [n > 0 ? wall(n, c / n) : 0, c];
  };
  const tried = settled(outlook.tried_visits, outlook.tried_cpu);
  const skipped = settled(outlook.skipped_visits, outlook.skipped_cpu);
  const every = outlook.smart_scan ? 9 : 1;
  const passing = (tried[0] + (every - 1) * skipped[0]) / every;
  const cpu = (tried[1] + (every - 1) * skipped[1]) / every;
  return {
    settle: end,
    cpu_cold: ksm.interpolate(end, time, work) / end,
    cpu_steady: passing > 0 ? cpu / passing : 0,
  };
};

ksm.whatIf = (host, { vms, ram, broken, pages_to_scan }) => {
  const { outlook, vms: grid } = host;
  const usable = ram - host.reserve;
  const usual = usable * (1 - host.headroom);
  const limit = usable + host.swap;
  const last = outlook.shares.length - 1;
  const right = Math.min(Math.max(outlook.shares.findIndex((share) => share >= broken), 1), last);
  const [low, high] = [outlook.shares[right - 1], outlook.shares[right]];
  const part = (broken - low) / (high - low);
  const unbroken = outlook.after.map((row) => row[0]);
  const breaks = outlook.after.map((row) => row[right - 1] * (1 - part) + row[right] * part);
  const at = (values) => ksm.interpolate(vms, grid, values);
  const [confident, after] = [at(unbroken), at(breaks)];
  const most = Math.min(ksm.most(grid, unbroken, usual), ksm.most(grid, breaks, limit));
  return {
    vms, ram, broken, pages_to_scan, usable, limit, confident, after, most,
    need: host.need.includes(null) ? null : at(host.need),
    need_low: at(host.need_low),
    need_high: at(host.need_high),
    without: at(host.without),
    fits: confident <= usual && after <= limit,
    at_least: most === grid[grid.length - 1],
    ...ksm.paced(host, vms, pages_to_scan),
  };
};

// As ksm.units writes them.
ksm.binary = (bytes) => {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let n = 0;
  for (; Math.abs(bytes) >= 1024 && n < units.length - 1; n++) bytes /= 1024;
  const digits = n ? 1 : 0;
  return `${bytes.toLocaleString("en-US", { minimumFractionDigits: digits, maximumFractionDigits: digits })} ${units[n]}`;
};
ksm.clock = (seconds) => {
  if (seconds < 60) return `${Number(seconds.toPrecision(3))} s`;
  let whole = Math.round(seconds);
  if (whole < 3600) return `${Math.floor(whole / 60)} min${whole % 60 ? ` ${whole % 60} s` : ""}`;
  whole = Math.round(seconds / 60);
  return `${Math.floor(whole / 60)} h${whole % 60 ? ` ${whole % 60} min` : ""}`;
};
ksm.percent = (share) => `${(100 * share).toFixed(1)}%`;

ksm.show = (form, host, found) => {
  const set = (name, text) => (form.elements[name].value = text);
  set("confident", ksm.binary(found.confident));
  set("need", found.need === null ? `${ksm.binary(found.need_low)} to ${ksm.binary(found.need_high)}` : ksm.binary(found.need));
  set("after", ksm.binary(found.after));
  set("without", ksm.binary(found.without));
  set("most", (found.at_least ? "≥ " : "") + found.most.toLocaleString("en-US"));
  set("settle", ksm.clock(found.settle));
  set("cpu_cold", ksm.percent(found.cpu_cold));
  set("cpu_steady", ksm.percent(found.cpu_steady));
  const vms = `${found.vms.toLocaleString("en-US")} VMs`;
  const tight = found.confident > found.usable * (1 - host.headroom);
  const why = tight ? "they leave less than the headroom" : `when ${+(100 * found.broken).toFixed(1)}% of the merged pages break, memory and swap run out`;
  set("verdict", found.fits ? `✓ ${vms} fit.` : `✗ ${vms} do not fit: ${why}.`);
  form.querySelector(".verdict").classList.toggle("no", !found.fits);
  const scale = 100 / Math.max(found.limit, found.after, found.confident, found.usable * 1.1);
  const gauge = form.querySelector(".gauge");
  gauge.querySelector(".need").style.width = `${found.confident * scale}%`;
  gauge.querySelector(".more").style.width = `${found.after * scale}%`;
  gauge.querySelector(".at").style.left = `${found.usable * scale}%`;
};

ksm.control = (form) => {
  const number = Number(form.dataset.host);
  const host = ksm.data.hosts[number];
  if (host.outlook === null) return form.remove();
  const sliders = [...form.querySelectorAll("[data-for]")];
  const field = (name) => form.elements[name];
  // pages_to_scan spans decades: its slider is logarithmic.
  const bend = (name) => (name === "pages_to_scan" ? [Math.log, Math.exp] : [(x) => x, (x) => x]);
  const range = (name) => [Number(field(name).min), Number(field(name).max)].map(bend(name)[0]);
  const place = (slider) => {
    const name = slider.dataset.for, [low, high] = range(name);
    slider.value = high > low ? (1000 * (bend(name)[0](Number(field(name).value)) - low)) / (high - low) : 0;
    slider.setAttribute("aria-valuetext", field(name).value);
  };
  const digits = { vms: 0, ram: host.ram / host.size < 16 ? 2 : 1, pages_to_scan: 0, broken: 0 };
  const update = () => {
    if (!form.checkValidity()) return;
    const asked = {
      vms: Math.round(Number(field("vms").value)),
      ram: Number(field("ram").value) * host.size,
      pages_to_scan: Math.round(Number(field("pages_to_scan").value)),
      broken: Number(field("broken").value) / 100,
    };
    const found = (form.found = ksm.whatIf(host, asked));
    ksm.show(form, host, found);
    const view = ksm.views[`host${number}-fits`];
    if (view) view.signal("ksm_vms", asked.vms).signal("ksm_usable", found.usable / host.size).runAsync();
  };
  for (const slider of sliders) {
    const name = slider.dataset.for;
    slider.addEventListener("input", () => {
      const [low, high] = range(name);
      const value = bend(name)[1](low + (slider.value / 1000) * (high - low));
      const rounded = Number(value.toFixed(digits[name]));
      field(name).value = Math.min(Math.max(rounded, Number(field(name).min)), Number(field(name).max));
      slider.setAttribute("aria-valuetext", field(name).value);
      update();
    });
    field(name).addEventListener("input", () => {
      place(slider);
      update();
    });
  }
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", () => setTimeout(() => (sliders.forEach(place), update())));
  sliders.forEach(place);
  update();
  ksm.drawn.then(update);
};
for (const form of document.querySelectorAll("form.whatif")) ksm.control(form);
