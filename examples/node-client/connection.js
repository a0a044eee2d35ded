// A client's streams to a halfpass server, one after the other where one is lost: docs/reference/protocol.md, "A stream" to
// "Connected again". What is sent is kept in memory until the server needs it no more; this process must live so long.
"use strict";

const grpc = require("@grpc/grpc-js");
const loader = require("@grpc/proto-loader");

const PATIENCE_MS = { first: 10_000, again: 600_000 }; // to reach the server, and to reach it again
const MOST_OF_TEST = 8; // batches of a test that are on their way
const OVERHEAD_BYTES = 2 ** 20; // of a message beyond what the window admits

class RunError extends Error {
  constructor(place, expected, found, remedy, exitStatus = 1) {
    super(`${place}: expected ${expected}, found ${found}; ${remedy}`);
    this.exitStatus = exitStatus;
  }
}

// Why the server stopped, or refused this client, in its own words.
class PassedOnError extends Error {
  constructor(said, exitStatus = 1) {
    super(said);
    this.exitStatus = exitStatus;
  }
}

class Connection {
  // `join`: the fields of Join, but for those that say how far it is. `window`, in bytes, and `timeout`, in seconds,
  // are settings of the run. `token`: instead of a certificate.
  constructor(address, proto, credentials, join, { window, timeout, token }) {
    const types = loader.loadSync(proto, { keepCase: true, longs: Number, defaults: true, oneofs: true });
    const { path, requestSerialize, responseDeserialize } = types["halfpass.SplitLearning"].Session;
    this.encode = requestSerialize;
    const streams = { requestStream: true, responseStream: true };
    const asBytes = { requestSerialize: (bytes) => bytes, responseDeserialize }; // what is sent is kept as bytes
    this.Client = grpc.makeGenericClientConstructor({ Session: { path, ...streams, ...asBytes } }, "SplitLearning");
    this.metadata = new grpc.Metadata();
    if (token) this.metadata.set("authorization", `Bearer ${token}`);
    const most = window + OVERHEAD_BYTES;
    this.options = { "grpc.max_receive_message_length": most, "grpc.max_send_message_length": most };
    this.options["grpc.enable_http_proxy"] = 0; // what is meant for this machine stays here
    Object.assign(this, { address, credentials, join, window, timeout: timeout * 1000 });

    this.run = ""; // the server's name for it
    this.last = 0; // place of this client's newest message
    this.kept = new Map(); // by place: messages that the server may need again
    this.applied = 0; // place up to which the server has worked off this client's
    this.durable = 0; // and up to which it needs none again
    this.received = 0; // place up to which the server's have come
    this.incoming = []; // to be taken
    this.number = 0; // of the stream
    this.joined = false; // on it
    this.ofTest = 0; // batches of a test that are not acknowledged
    this.away = performance.now(); // since when there is no stream
    this.failure = null;
    this.closed = false;
    this.wakers = [];
    this.open();
    this.clock = setInterval(() => this.beat(), Math.min(5000, this.timeout / 4));
  }

  // ---- what the training calls

  // The next message that asks for something, and the number of the stream on which it came.
  async receive() {
    await this.until(() => this.incoming.length > 0);
    return this.incoming.shift();
  }

  // A message of the sequence; waits where the window is full.
  async send(message) {
    const bytes = this.encode({ ...message, place: this.last + 1 });
    await this.until(() => this.bytesAhead() === 0 || this.bytesAhead() + bytes.length <= this.window);
    this.last += 1;
    this.kept.set(this.last, bytes);
    if (this.joined) this.call.write(bytes);
  }

  // A message of the test that was asked for on that stream. Whether the stream is still there: if not, the test is
  // asked for again.
  async sendOfTest(message, stream) {
    const there = () => stream === this.number && this.joined;
    await this.until(() => !there() || this.ofTest < MOST_OF_TEST);
    if (!there()) return false;
    this.ofTest += message.batch ? 1 : 0;
    this.call.write(this.encode(message));
    return true;
  }

  async finish() {
    await this.send({ finished: {} });
    await this.until(() => this.durable >= this.last);
    this.close();
  }

  // Ends the run for all, with a reason.
  fail(reason, exitStatus) {
    if (!this.closed && this.joined) this.call.write(this.encode({ failed: { reason, exit_status: exitStatus } }));
    this.close();
  }

  close() {
    this.closed = true;
    clearInterval(this.clock);
    clearTimeout(this.again);
    this.call.end();
    const { client } = this;
    setTimeout(() => client.close(), 1000).unref(); // what was written goes out first
  }

  // ---- within

  bytesAhead() {
    let bytes = 0;
    for (const [place, message] of this.kept) bytes += place > this.applied ? message.length : 0;
    return bytes;
  }

  async until(ready) {
    while (!this.failure && !ready()) await new Promise((resolve) => this.wakers.push(resolve));
    if (this.failure) throw this.failure;
  }

  wake() {
    for (const resolve of this.wakers.splice(0)) resolve();
  }

  open() {
    this.number += 1;
    this.heard = performance.now();
    this.client = new this.Client(this.address, this.credentials, this.options);
    this.call = this.client.Session(this.metadata);
    const number = this.number;
    this.call.on("data", (message) => number === this.number && this.accept(message));
    this.call.on("error", (error) => this.lost(number, error.details || error.message));
    this.call.on("end", () => this.lost(number, "the end of the stream"));
    const place = { run: this.run, received: this.received, first: this.durable + 1 };
    this.call.write(this.encode({ join: { ...this.join, ...place }, durable: this.received }));
  }

  // Every few seconds: a sign of life, and with it up to which of the server's messages this client needs none again.
  // It goes on only as long as this process lives, so what it has is durable enough.
  beat() {
    if (this.again) return; // there is no stream
    if (performance.now() - this.heard > this.timeout) this.call.cancel(); // "error" comes of it
    else this.call.write(this.encode({ alive: {}, durable: this.received }));
  }

  lost(number, why) {
    if (number !== this.number || this.closed || this.failure || this.again) return;
    this.joined = false;
    this.ofTest = 0;
    this.client.close();
    if (!this.away) {
      this.away = performance.now();
      console.error(`lost the server at ${this.address} (${why}); trying to reach it again`);
    }
    const [patience, exitStatus] = this.run ? [PATIENCE_MS.again, 1] : [PATIENCE_MS.first, 2];
    if (performance.now() - this.away > patience) {
      const remedy = "look at what the server printed";
      const expected = `a connection within ${patience / 1000} s`;
      this.failure = new RunError(`server at ${this.address}`, expected, why, remedy, exitStatus);
    } else {
      this.again = setTimeout(() => {
        this.again = null;
        this.open();
      }, 200 + 800 * Math.random());
    }
    this.wake();
  }

  accept(message) {
    this.heard = performance.now();
    this.applied = Math.max(this.applied, message.applied);
    this.durable = Math.max(this.durable, message.durable);
    for (const place of this.kept.keys()) if (place <= this.durable) this.kept.delete(place);
    try {
      if (message.kind === "joined") this.goOn(message.joined);
      else if (message.kind === "ack") this.ofTest -= message.ack.test ? 1 : 0;
      else if (message.kind === "failed") throw new PassedOnError(message.failed.reason, message.failed.exit_status);
      else if (message.kind === "rejected") throw new PassedOnError(`rejected: ${message.rejected.reason}`);
      else if (message.kind !== "alive") this.take(message);
    } catch (error) {
      this.failure = error;
    }
    this.wake();
  }

  take(message) {
    if (message.place > 0 && message.place <= this.received) return; // it came on an earlier stream
    if (message.place > this.received + 1) {
      throw new RunError("the server", `its message ${this.received + 1}`, `number ${message.place}`, "report this");
    }
    this.received = Math.max(this.received, message.place);
    this.incoming.push({ message, stream: this.number });
  }

  goOn(joined) {
    if (this.run && joined.run !== this.run) {
      throw new RunError("the server", `run ${this.run}`, `run ${joined.run}`, "begin both sides anew");
    }
    if (joined.received < this.durable) {
      const expected = `this client's messages up to ${this.durable}`;
      throw new RunError("the server", expected, `up to ${joined.received}`, "restore its run folder, or begin anew");
    }
    this.run = joined.run;
    this.away = null;
    this.joined = true;
    this.applied = joined.received; // a server that went back to its checkpoint has less than it once said
    for (const [place, bytes] of this.kept) if (place > joined.received) this.call.write(bytes);
  }
}

module.exports = { Connection, RunError, grpc };
