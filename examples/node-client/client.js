// A client of a halfpass run that is not Python: it knows halfpass.proto and docs/reference/protocol.md, and what join.json says
// of the run. What it uploads is made up; a client half would compute it.
//
//     node client.js HOST:PORT CERTS [PROTO]
//
// CERTS has authority.pem, and client-0.pem and client-0-key.pem or client-0.token, of `halfpass certs`. README.md here
// says how the server is started. Exit status: 0 done, 1 the run failed, 2 the arguments were wrong.
"use strict";

const crypto = require("node:crypto");
const fs = require("node:fs");
const path = require("node:path");
const { Connection, RunError, grpc } = require("./connection.js");

const PROTOCOL = 11;
const CLIENT = 0;
const TEST_SAMPLES = 50;
const PROTO = path.join(__dirname, "../../halfpass/wire/halfpass.proto");

// ---- what goes up

// A made-up batch at the cut: of class c, channel c is larger than the others. A client half would give such values.
// Returns them in storage order, channels last: (B, H, W, C).
function activations(labels, [channels, height, width], draw) {
  const values = new Float32Array(labels.length * height * width * channels);
  for (let at = 0; at < values.length; at++) {
    const label = labels[Math.floor(at / (height * width * channels))];
    values[at] = Math.max(0, draw() + (at % channels === label ? 1 : 0)); // as a ReLU's
  }
  return values;
}

// The same numbers for the same seed: a batch that is made again must be the one that it was (mulberry32).
function generator(seed) {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let t = Math.imul(state ^ (state >>> 15), state | 1);
    t = (t + Math.imul(t ^ (t >>> 7), t | 61)) ^ t;
    return ((t ^ (t >>> 14)) >>> 0) / 2 ** 32 - 0.5;
  };
}

const CODECS = {
  none(values) {
    return Buffer.from(values.buffer, values.byteOffset, values.byteLength); // little-endian, as this machine's
  },
  // (R, C) → lowest level of each channel, step of each, codes. Where a channel's least value is 0, so is its level.
  int8(values, channels) {
    const low = new Float32Array(channels).fill(Infinity);
    const high = new Float32Array(channels).fill(-Infinity);
    values.forEach((value, at) => {
      const channel = at % channels;
      low[channel] = Math.min(low[channel], value);
      high[channel] = Math.max(high[channel], value);
    });
    const step = low.map((least, channel) => Math.max((high[channel] - least) / 255, 2 ** -126));
    const codes = Uint8Array.from(values, (value, at) => {
      const channel = at % channels;
      return Math.min(255, Math.round((value - low[channel]) / step[channel]));
    });
    return Buffer.concat([CODECS.none(low), CODECS.none(step), codes]);
  },
};

// A number from 0 to 1 as float16, rounded towards 0: sign, exponent and 10 bits of mantissa.
function float16(value) {
  if (value < 2 ** -14) return Math.floor(value * 2 ** 24); // subnormal
  const exponent = Math.floor(Math.log2(value));
  return ((exponent + 15) << 10) | Math.floor((value / 2 ** exponent - 1) * 1024);
}

// What the auxiliary head answers in a test: (B, outputs) probabilities. Made up: four fifths for the right class.
function answersOf(labels, outputs) {
  const halves = Uint16Array.from({ length: labels.length * outputs }, (_, at) =>
    float16(at % outputs === labels[Math.floor(at / outputs)] ? 0.8 : 0.2 / (outputs - 1)));
  return { dtype: "float16", shape: [labels.length, outputs], codec: "none", data: CODECS.none(halves) };
}

function makeBatch(said, settings, epoch, step, test) {
  const size = settings["train.batch_size"];
  const samples = Math.min(size, (test ? TEST_SAMPLES : said.samples) - step * size);
  const draw = generator(test ? 1e6 + step : epoch * 1000 + step);
  const labels = Array.from({ length: samples }, () => Math.floor((draw() + 0.5) * said.outputs));
  const [, shape] = JSON.parse(said.inputs)[""]; // its client half computes elsewhere: what crosses are its inputs
  const codec = settings["wire.codec"];
  const data = CODECS[codec](activations(labels, shape, draw), shape[0]);
  const tensor = { dtype: "float32", shape: [samples, ...shape], channels_last: true, codec, data };
  const batch = { test, client: CLIENT, epoch, step, tensors: [tensor], labels };
  if (test) batch.answers = answersOf(labels, said.outputs);
  return batch;
}

// ---- the run

async function trainUntil(connection, said, settings, begin, done) {
  const began = performance.now();
  for (let step = done; step < begin.until; step++) {
    await connection.send({ batch: makeBatch(said, settings, begin.epoch, step, false) });
    await new Promise(setImmediate); // the stream is served in between
  }
  const epochEnd = {
    epoch: begin.epoch,
    loss: NaN, // of the auxiliary head; nothing was learned here
    busy_seconds: (performance.now() - began) / 1000,
    samples: Math.min(said.samples, begin.until * settings["train.batch_size"]),
    uploads: begin.until,
    peak_memory_bytes: process.memoryUsage().rss,
  };
  await connection.send({ epoch_end: epochEnd });
}

// Until all of it is sent, or the stream is lost: then the server asks for it again.
async function runTest(connection, said, settings, epoch, stream) {
  const size = settings["train.batch_size"];
  for (let step = 0; step * size < TEST_SAMPLES; step++) {
    if (!(await connection.sendOfTest({ batch: makeBatch(said, settings, epoch, step, true) }, stream))) return;
  }
  // With has_head it would give the scores of its head too, by the server's names of the metrics.
  await connection.sendOfTest({ test_end: { epoch, samples: TEST_SAMPLES, has_head: false } }, stream);
}

async function follow(connection, said, settings) {
  let [epoch, done] = [0, 0]; // at work, and how many of its steps are done
  for (;;) {
    const { message, stream } = await connection.receive();
    const asked = message[message.kind];
    if (asked.weights && asked.weights.length > 0) {
      const found = `${asked.weights.length}`;
      throw new RunError("the server", "no weights for the only client", found, "set clients.count to 1");
    }
    if (message.kind === "begin") {
      if (asked.epoch !== epoch) [epoch, done] = [asked.epoch, 0];
      if (epoch >= settings["train.epochs"] || asked.until < done || asked.until > said.steps) {
        const found = `epoch ${epoch} up to step ${asked.until}`;
        throw new RunError("the server", "an epoch of the settings", found, "make join.json anew: halfpass agreement");
      }
      await trainUntil(connection, said, settings, asked, done);
      done = asked.until;
    } else if (message.kind === "test") {
      await runTest(connection, said, settings, asked.epoch, stream);
    } else if (message.kind === "finish") {
      await connection.finish();
      return;
    }
  }
}

function read(file) {
  try {
    return fs.readFileSync(file);
  } catch (error) {
    throw new RunError(file, "a file that can be read", error.code, "check the path", 2);
  }
}

// By a token where there is one, else by a certificate.
function connect(address, certs, proto, said, settings) {
  const file = (name) => path.join(certs, name);
  const authority = read(file("authority.pem"));
  const options = { window: settings["wire.window"], timeout: settings["wire.timeout"] };
  const own = `client-${CLIENT}`;
  if (fs.existsSync(file(`${own}.token`))) options.token = read(file(`${own}.token`)).toString().trim();
  const pair = options.token ? [] : [read(file(`${own}-key.pem`)), read(file(`${own}.pem`))];
  return new Connection(address, proto, grpc.credentials.createSsl(authority, ...pair), said, options);
}

async function main([address, certs, proto = PROTO]) {
  if (!address || !certs) {
    const expected = "HOST:PORT and a folder of certificates";
    throw new RunError("arguments", expected, "fewer", "node client.js HOST:PORT CERTS", 2);
  }
  const said = JSON.parse(read(path.join(__dirname, "join.json")));
  if (said.protocol !== PROTOCOL || said.client !== CLIENT) {
    const found = `protocol ${said.protocol}, client ${said.client}`;
    throw new RunError("join.json", `protocol ${PROTOCOL}, client ${CLIENT}`, found, "see README.md", 2);
  }
  const settings = JSON.parse(said.settings);
  if (!CODECS[settings["wire.codec"]]) {
    const expected = `one of ${Object.keys(CODECS).join(", ")}`;
    throw new RunError("wire.codec", expected, settings["wire.codec"], "choose another in run.yaml", 2);
  }
  read(proto);
  said.process = crypto.randomInt(1, 2 ** 47); // whose streams take each other's place
  const connection = connect(address, certs, proto, said, settings);
  try {
    await follow(connection, said, settings);
  } catch (error) {
    connection.fail(`client ${CLIENT}: ${error.message}`, error.exitStatus || 1);
    throw error;
  }
}

main(process.argv.slice(2)).catch((error) => {
  console.error(error.exitStatus ? `halfpass client: ${error.message}` : error); // a defect has its traceback
  process.exitCode = error.exitStatus || 1;
});
