// What npm's openai makes of a running server: node openai_client.mjs URL MODEL WHAT prints JSON.

import OpenAI from "openai";

const [url, model, what] = process.argv.slice(2);
const client = new OpenAI({ baseURL: url, apiKey: "none", maxRetries: 0 });
const input = "Say hello.";
const messages = [{ role: "user", content: input }];
const parameters = { type: "object", properties: { city: { type: "string" } }, required: ["city"], additionalProperties: false };
const format = { name: "place", schema: parameters, strict: true };
const short = { model, messages, temperature: 0, max_completion_tokens: 12 };

const scenarios = {
  async chat() {
    const answer = await client.chat.completions.create(short);
    return { text: answer.choices[0].message.content, reason: answer.choices[0].finish_reason };
  },

  async stream() {
    let text = "";
    const stream = await client.chat.completions.create({ ...short, stream: true, stream_options: { include_usage: true } });
    let usage;
    for await (const chunk of stream) {
      text += chunk.choices[0]?.delta?.content ?? "";
      usage = chunk.usage ?? usage;
    }
    return { text, tokens: usage.completion_tokens };
  },

  async tools() {
    const answer = await client.chat.completions.create({
      ...short,
      max_completion_tokens: 60,
      tools: [{ type: "function", function: { name: "weather", parameters } }],
      tool_choice: "required",
    });
    const [call] = answer.choices[0].message.tool_calls;
    return { name: call.function.name, arguments: JSON.parse(call.function.arguments), reason: answer.choices[0].finish_reason };
  },

  async schema() {
    const answer = await client.chat.completions.create({
      ...short,
      max_completion_tokens: 60,
      response_format: { type: "json_schema", json_schema: format },
    });
    return JSON.parse(answer.choices[0].message.content);
  },

  async error() {
    try {
      await client.chat.completions.create({ ...short, model: "nobody" });
    } catch (error) {
      return { kind: error.constructor.name, status: error.status, code: error.code, id: Boolean(error.requestID) };
    }
  },

  async cancel() {
    const stream = await client.chat.completions.create({ ...short, stream: true, max_completion_tokens: 1000, ignore_eos: true });
    for await (const chunk of stream) {
      if (chunk.choices[0].delta.content) {
        stream.controller.abort();
        return { id: chunk.id };
      }
    }
  },

  async responses() {
    const first = await client.responses.create({ model, input, temperature: 0, max_output_tokens: 12 });
    const second = await client.responses.create({ model, input: "And again.", previous_response_id: first.id, max_output_tokens: 8 });
    const kept = await client.responses.retrieve(second.id);
    const items = await client.responses.inputItems.list(second.id, { order: "asc" });
    await client.responses.delete(first.id);
    return { text: first.output_text, same: kept.output_text === second.output_text, items: items.data.map((item) => item.role) };
  },

  async responses_stream() {
    const stream = client.responses.stream({ model, input, temperature: 0, max_output_tokens: 12 });
    let text = "";
    stream.on("response.output_text.delta", (event) => (text += event.delta));
    const final = await stream.finalResponse();
    return { text, final: final.output_text };
  },

  async responses_tools() {
    const answer = await client.responses.create({
      model,
      input,
      temperature: 0,
      tools: [{ type: "function", name: "weather", parameters, strict: true }],
      tool_choice: { type: "function", name: "weather" },
    });
    const call = answer.output.find((item) => item.type === "function_call");
    return { name: call.name, arguments: JSON.parse(call.arguments) };
  },

  async responses_schema() {
    const answer = await client.responses.create({ model, input, temperature: 0, text: { format: { type: "json_schema", ...format } } });
    return JSON.parse(answer.output_text);
  },

  async responses_error() {
    try {
      await client.responses.create({ model, input, truncation: "auto" });
    } catch (error) {
      return { kind: error.constructor.name, status: error.status, param: error.param };
    }
  },

  async responses_cancel() {
    const begun = await client.responses.create({ model, input, background: true, logit_bias: {}, max_output_tokens: 1000 });
    const cancelled = await client.responses.cancel(begun.id);
    return { begun: begun.status, cancelled: cancelled.status };
  },
};

console.log(JSON.stringify(await scenarios[what]()));
