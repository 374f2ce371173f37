// How the next answer is to be written: kept in the browser from one visit to the next.

import type { Mode, Strategy } from "./api.js";

export interface Arm {
  strategy: string;
  tau: number;
}

export interface Settings {
  mode: Mode;
  arm: Arm;
  other: Arm;
  compare: boolean;
  system: string;
  /** Whether the text shows who wrote what. */
  marks: boolean;
  /** The numbers that may be left to the server, as typed. */
  numbers: Record<string, string>;
}

const STORED = "mtad.settings";

const DEFAULTS: Settings = {
  mode: "chat",
  arm: { strategy: "", tau: 0.1 },
  other: { strategy: "", tau: 0.1 },
  compare: false,
  system: "",
  marks: true,
  numbers: { max_tokens: "400" },
};

export function load(): Settings {
  try {
    const stored = JSON.parse(localStorage.getItem(STORED) ?? "{}") as Partial<Settings>;
    return { ...structuredClone(DEFAULTS), ...stored };
  } catch {
    return structuredClone(DEFAULTS);
  }
}

export function save(settings: Settings): void {
  try {
    localStorage.setItem(STORED, JSON.stringify(settings));
  } catch {
    // A browser that keeps nothing still has a working page.
  }
}

// The slider's positions: 0 is tau 0, then twenty steps for each factor of ten from 0.001 on.
export const TAU_STEPS = 71;
const PER_DECADE = 20;
const LEAST_EXPONENT = -3;

export function tauAt(position: number): number {
  if (position <= 0) return 0;
  return Number((10 ** (LEAST_EXPONENT + (position - 1) / PER_DECADE)).toPrecision(2));
}

export function positionOf(tau: number): number {
  if (tau <= 0) return 0;
  const position = 1 + Math.round((Math.log10(tau) - LEAST_EXPONENT) * PER_DECADE);
  return Math.min(Math.max(position, 1), TAU_STEPS);
}

/** Numbers of every request, and those of strategies that know them: field and knob. */
const PLAIN = ["temperature", "top_p", "top_k", "max_tokens"];
const KNOBS: [string, string][] = [["gamma", "gamma"], ["beam_width", "beam_width"]];

/** Whether a strategy heeds a knob. Of one that the server does not list, nothing is known. */
export function heeds(strategy: Strategy | undefined, knob: string): boolean {
  return strategy?.knobs.includes(knob) ?? false;
}

/** The part of a request that says how to write; what the strategy does not heed is left out. */
export function request(
  settings: Settings,
  arm: Arm,
  strategy: Strategy | undefined,
  seed: number,
): Record<string, unknown> {
  const made: Record<string, unknown> = { seed };
  const put = (field: string) => {
    const typed = settings.numbers[field] ?? "";
    if (typed !== "") made[field] = Number(typed);
  };
  PLAIN.forEach(put);
  if (strategy) {
    made.strategy = strategy.name;
    if (heeds(strategy, "tau")) made.tau = arm.tau;
    for (const [field, knob] of KNOBS) if (heeds(strategy, knob)) put(field);
  }
  return made;
}

/** The seed as typed, or another one each time: an answer can then be had again by its seed. */
export function seed(settings: Settings): number {
  const typed = settings.numbers.seed ?? "";
  return typed === "" ? Math.floor(Math.random() * 1_000_000) : Number(typed);
}
