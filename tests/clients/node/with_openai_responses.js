// OpenAI's own Node SDK, asking in its newer words. Tells the same as the Python scripts.

import OpenAI from "openai";

import {
  ENOUGH_TOKENS,
  MODEL,
  SLOW_KEY,
  VIEWERS_KEY,
  errorOf,
  question,
  review,
  tell,
  weather,
} from "./asking.js";

const client = new OpenAI();
const enough = { max_output_tokens: ENOUGH_TOKENS };

const tool = { type: "function", name: "get_weather", parameters: weather, strict: true };
const call = { tools: [tool], tool_choice: "required", parallel_tool_calls: false, ...enough };

const settings = (fields) => ({
  model: MODEL,
  input: question,
  max_output_tokens: 24,
  temperature: 0,
  ...fields,
});
const ask = (fields = {}, by = client, options = {}) =>
  by.responses.create(settings(fields), options);

async function chat() {
  return (await ask()).output_text;
}

async function stream() {
  const pieces = [];
  for await (const event of await ask({ stream: true })) {
    if (event.type === "response.output_text.delta") pieces.push(event.delta);
  }
  return pieces;
}

async function usage() {
  const { usage: whole } = await ask();
  let last;
  for await (const event of await ask({ stream: true })) last = event;
  if (last.type !== "response.completed") throw new Error(`the last event is ${last.type}`);
  if (last.response.usage.total_tokens !== whole.total_tokens) {
    throw new Error("two usages of one answer");
  }
  return [whole.input_tokens, whole.output_tokens];
}

async function tools() {
  const { output } = await ask(call);
  const [made] = output;
  const said = { type: "function_call_output", call_id: made.call_id, output: "Sunny." };
  const asked = { role: "user", content: question };
  await ask({ input: [asked, ...output, said], tools: [tool] });
  return [made.name, made.arguments];
}

async function tools_streamed() {
  const events = client.responses.stream(settings(call));
  const [made] = (await events.finalResponse()).output;
  return [made.name, made.arguments];
}

async function schema() {
  const format = { type: "json_schema", name: "review", strict: true, schema: review };
  const answer = await client.responses.parse(settings({ text: { format }, ...enough }));
  return answer.output_parsed;
}

async function errors() {
  const by = (apiKey) => client.withOptions({ apiKey, maxRetries: 0 });
  const attempt = { headers: { "Idempotency-Key": "response-to-node" } };
  await ask({}, client, attempt);
  // Others before this client may have asked already.
  await errorOf(() => ask({ max_output_tokens: 1 }, by(SLOW_KEY)));
  return {
    400: await errorOf(() => ask({ store: true })),
    401: await errorOf(() => ask({}, by("nobody's"))),
    403: await errorOf(() => ask({}, by(VIEWERS_KEY))),
    404: await errorOf(() => ask({ model: "nobody's" })),
    422: await errorOf(() => ask({ top_p: 0.5 }, client, attempt)),
    429: await errorOf(() => ask({ max_output_tokens: 1 }, by(SLOW_KEY))),
  };
}

await tell(chat, stream, usage, tools, tools_streamed, schema, errors);
