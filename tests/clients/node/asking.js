// What both of these scripts ask for, and how they tell what came of it.

export const { MODEL, EMBEDDER, VIEWERS_KEY, SLOW_KEY } = process.env;
export const question = "How many open orders are there?";
export const ENOUGH_TOKENS = 120;

const object = (properties) => ({
  type: "object",
  properties,
  required: Object.keys(properties),
  additionalProperties: false,
});
export const weather = object({
  unit: { type: "string", enum: ["celsius", "fahrenheit"] },
  days: { type: "integer", minimum: 1, maximum: 9 },
});
export const review = object({
  mood: { type: "string", enum: ["good", "bad"] },
  stars: { type: "integer", minimum: 1, maximum: 5 },
});

export async function errorOf(call) {
  try {
    await call();
  } catch (error) {
    return error.constructor.name;
  }
  return "nothing";
}

// A fact for each function, under its name.
export async function tell(...notions) {
  const facts = {};
  for (const notion of notions) facts[notion.name] = await notion();
  console.log(JSON.stringify(facts));
}
