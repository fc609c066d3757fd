// What Vercel's AI SDK makes of a running server: node ai_sdk.mjs URL MODEL PROVIDER WHAT prints JSON.

import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { APICallError, Output, generateText, stepCountIs, streamText, tool } from "ai";
import { z } from "zod";

const [url, name, provider, what] = process.argv.slice(2);
const models = {
  chat: () => createOpenAICompatible({ name: "tokenrelay", baseURL: url, supportsStructuredOutputs: true, includeUsage: true })(name),
  responses: () => createOpenAI({ baseURL: url, apiKey: "none" }).responses(name),
};
const model = models[provider]();
const prompt = "Say hello.";
const short = { model, prompt, temperature: 0, maxOutputTokens: 12, maxRetries: 0 };
const city = z.object({ city: z.string() });

const scenarios = {
  async chat() {
    const { text, finishReason } = await generateText(short);
    return { text, reason: finishReason };
  },

  async stream() {
    const answer = streamText(short);
    let text = "";
    for await (const piece of answer.textStream) text += piece;
    return { text, tokens: (await answer.usage).outputTokens };
  },

  // The model has to call, gets the result, and is asked once more.
  async tools() {
    const asked = [];
    const weather = tool({
      inputSchema: city,
      execute: async (input) => {
        asked.push(input);
        return "sunny";
      },
    });
    const { steps } = await generateText({
      ...short,
      maxOutputTokens: 60,
      tools: { weather },
      toolChoice: "required",
      stopWhen: stepCountIs(2),
    });
    return { asked, steps: steps.length };
  },

  async schema() {
    const { output } = await generateText({ ...short, maxOutputTokens: 100, output: Output.object({ schema: city }) });
    return output;
  },

  async error() {
    try {
      const nobody = { chat: createOpenAICompatible({ name: "tokenrelay", baseURL: url }), responses: createOpenAI({ baseURL: url, apiKey: "none" }) };
      await generateText({ ...short, model: nobody[provider]("nobody") });
    } catch (error) {
      return { known: APICallError.isInstance(error), status: error.statusCode, retryable: error.isRetryable };
    }
  },

  async cancel() {
    const abort = new AbortController();
    const answer = streamText({ ...short, maxOutputTokens: 1000, abortSignal: abort.signal, includeRawChunks: true });
    let id;
    for await (const part of answer.fullStream) {
      if (part.type === "raw") id = part.rawValue.id ?? part.rawValue.response?.id ?? id;
      if (part.type === "text-delta") abort.abort();
      if (part.type === "abort") return { id };
    }
  },
};

console.log(JSON.stringify(await scenarios[what]()));
