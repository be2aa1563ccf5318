// OpenAI's own Node SDK. Told the same as the Python scripts, and tells the same.

import OpenAI from "openai";

import {
  EMBEDDER,
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
const messages = [{ role: "user", content: question }];
const texts = ["open orders", "A pirate's favourite letter"];
const enough = { max_tokens: ENOUGH_TOKENS };

const tool = { type: "function", function: { name: "get_weather", parameters: weather } };

const ask = (fields = {}, by = client, options = {}) =>
  by.chat.completions.create(
    { model: MODEL, messages, max_tokens: 24, temperature: 0, ...fields },
    options,
  );

async function chat() {
  return (await ask()).choices[0].message.content;
}

async function stream() {
  const pieces = [];
  for await (const chunk of await ask({ stream: true })) {
    if (chunk.choices[0].delta.content) pieces.push(chunk.choices[0].delta.content);
  }
  return pieces;
}

async function usage() {
  const { usage: whole } = await ask();
  let last;
  for await (const chunk of await ask({ stream: true, stream_options: { include_usage: true } })) {
    last = chunk;
  }
  if (last.usage.total_tokens !== whole.total_tokens) throw new Error("two usages of one answer");
  return [whole.prompt_tokens, whole.completion_tokens];
}

async function tools() {
  const choice = { tools: [tool], tool_choice: "required", parallel_tool_calls: false };
  const answer = (await ask({ ...choice, ...enough })).choices[0].message;
  const [call] = answer.tool_calls;
  const result = { role: "tool", tool_call_id: call.id, content: "Sunny." };
  await ask({ messages: [...messages, answer, result], tools: [tool], tool_choice: "none" });
  return [call.function.name, call.function.arguments];
}

async function tools_streamed() {
  const choice = { tools: [tool], tool_choice: "required", parallel_tool_calls: false };
  const runner = client.chat.completions.stream({
    model: MODEL,
    messages,
    temperature: 0,
    ...choice,
    ...enough,
  });
  const [call] = (await runner.finalChatCompletion()).choices[0].message.tool_calls;
  return [call.function.name, call.function.arguments];
}

async function schema() {
  const format = { type: "json_schema", json_schema: { name: "review", strict: true, schema: review } };
  const answer = await client.chat.completions.parse({
    model: MODEL,
    messages,
    response_format: format,
    temperature: 0,
    ...enough,
  });
  return JSON.parse(answer.choices[0].message.content);
}

async function models() {
  const found = [];
  for await (const model of client.models.list()) found.push(model.id);
  return found;
}

async function embeddings() {
  const answer = await client.embeddings.create({ model: EMBEDDER, input: texts });
  return answer.data.map((each) => each.embedding);
}

async function errors() {
  const by = (apiKey) => client.withOptions({ apiKey, maxRetries: 0 });
  const attempt = { headers: { "Idempotency-Key": "attempt-from-node" } };
  await ask({}, client, attempt);
  // Others before this client may have asked already.
  await errorOf(() => ask({ max_tokens: 1 }, by(SLOW_KEY)));
  return {
    400: await errorOf(() => ask({ max_tokens: -1 })),
    401: await errorOf(() => ask({}, by("nobody's"))),
    403: await errorOf(() => ask({}, by(VIEWERS_KEY))),
    404: await errorOf(() => ask({ model: "nobody's" })),
    422: await errorOf(() => ask({ seed: 1 }, client, attempt)),
    429: await errorOf(() => ask({ max_tokens: 1 }, by(SLOW_KEY))),
  };
}

await tell(chat, stream, usage, tools, tools_streamed, schema, models, embeddings, errors);
