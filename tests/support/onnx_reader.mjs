// A process that reads an ONNX model: node onnx_reader.mjs FOLDER PACKAGE MODEL SCRATCH, FOLDER the one of node_modules.
// Runs the steps of SCRATCH/feeds.json, the caches of one into the next, and writes the logits of all to
// SCRATCH/logits.bin. Prints the version of PACKAGE.
import fs from "node:fs";
import path from "node:path";
import { createRequire } from "node:module";

const [, , folder, name, model, scratch] = process.argv;
const require = createRequire(path.join(folder, "index.js"));
const ort = require(name);
const file = path.join(model, "model.onnx");

async function session() {
  if (name !== "onnxruntime-web") {
    return ort.InferenceSession.create(file, { extra: { session: { x64quantprecision: "1" } } });
  }
  ort.env.wasm.numThreads = 1;
  const weights = fs.readdirSync(model).filter((entry) => entry.endsWith(".safetensors"));
  const externalData = weights.map((entry) => ({ path: entry, data: fs.readFileSync(path.join(model, entry)) }));
  return ort.InferenceSession.create(fs.readFileSync(file), { externalData, executionProviders: ["wasm"] });
}

const described = JSON.parse(fs.readFileSync(path.join(scratch, "feeds.json")));
let caches = described.widths.map((width) => new ort.Tensor("float32", new Float32Array(0), [2, 0, width]));
const logits = [];
try {
  const opened = await session();
  for (const step of described.steps) {
    const feeds = {};
    for (const [input, { dims, data }] of Object.entries(step)) {
      feeds[input] = new ort.Tensor("int64", BigInt64Array.from(data.map(BigInt)), dims);
    }
    caches.forEach((cache, layer) => { feeds[`past_key_values.${layer}.latent`] = cache; });
    const results = await opened.run(feeds);
    caches = caches.map((_, layer) => results[`present.${layer}.latent`]);
    const { buffer, byteOffset, byteLength } = results.logits.data;
    logits.push(Buffer.from(buffer.slice(byteOffset, byteOffset + byteLength)));
  }
} catch (error) {
  console.error(String(error.message).replaceAll("\n", " "));
  process.exit(1);
}
fs.writeFileSync(path.join(scratch, "logits.bin"), Buffer.concat(logits));
console.log(JSON.parse(fs.readFileSync(path.join(folder, "node_modules", name, "package.json"))).version);
