// Moves blocks between two regions of an xferd daemon and checks every byte. All it knows of xferd is the proto file.
//
//   XFERD_GRPC_SOCKET=/run/xferd/grpc.sock node transfer.mjs
//
// Prints one line of JSON; exits 1 if a call fails or a byte is wrong.

import { randomBytes } from "node:crypto";
import { fileURLToPath } from "node:url";
import { setTimeout as sleep } from "node:timers/promises";
import grpc from "@grpc/grpc-js";
import protoLoader from "@grpc/proto-loader";

const PROTO = process.env.XFERD_PROTO ?? fileURLToPath(new URL("../../../api/proto/xferd_v1.proto", import.meta.url));
const SOCKET = process.env.XFERD_GRPC_SOCKET ?? "/run/xferd/grpc.sock";

const BLOCK = 4096;
const BLOCKS = 64;
const CHUNK = 48 * 1024; // bytes in one message of a Write stream; anything below the daemon's message limit will do
const TIMEOUT_MS = 30_000;

// 64-bit numbers arrive as strings, which every call takes back: a region id does not fit into a double.
const definition = protoLoader.loadSync(PROTO, { keepCase: true, longs: String, enums: String, defaults: true });
const xferd = grpc.loadPackageDefinition(definition).xferd.v1;

/** Packs numbers as a column: little-endian u64, one after the other. */
function column(values) {
  const bytes = Buffer.alloc(values.length * 8);
  values.forEach((value, row) => bytes.writeBigUInt64LE(BigInt(value), row * 8));
  return bytes;
}

/** Turns a unary method of a client into one that returns a promise. */
function unary(client, method, token) {
  const metadata = new grpc.Metadata();
  metadata.set("authorization", `Bearer ${token}`);
  return (request) =>
    new Promise((resolve, reject) => {
      const options = { deadline: Date.now() + TIMEOUT_MS };
      client[method](request, metadata, options, (error, answer) => (error ? reject(error) : resolve(answer)));
    });
}

/** Opens a session. It lives as long as the stream, so the stream is returned too. */
function openSession(client, agent) {
  return new Promise((resolve, reject) => {
    const stream = client.Open({ agent });
    stream.on("data", (event) => {
      if (event.opened) resolve({ grant: event.opened, stream });
      else console.error(`the daemon ends the session: ${event.closing}`);
    });
    stream.on("error", reject); // after `opened` this is our own cancel, and the promise is settled already
  });
}

/** Streams bytes into a region, waiting whenever the connection is full. */
async function write(client, token, region, data) {
  const metadata = new grpc.Metadata();
  metadata.set("authorization", `Bearer ${token}`);
  let stream;
  const answer = new Promise((resolve, reject) => {
    stream = client.Write(metadata, (error, reply) => (error ? reject(error) : resolve(reply)));
  });
  for (let offset = 0; offset < data.length; offset += CHUNK) {
    const more = stream.write({ region, offset, data: data.subarray(offset, offset + CHUNK) });
    // A failed call never drains: `answer` then brings the error.
    if (!more) await Promise.race([new Promise((resolve) => stream.once("drain", resolve)), answer]);
  }
  stream.end();
  return Number((await answer).nbytes);
}

/** Reads a span of a region. */
async function read(client, token, region, nbytes) {
  const metadata = new grpc.Metadata();
  metadata.set("authorization", `Bearer ${token}`);
  const parts = [];
  for await (const message of client.Read({ region, offset: 0, nbytes }, metadata)) parts.push(message.data);
  return Buffer.concat(parts);
}

/** Polls until the transfer is DONE; throws when it fails or takes too long. */
async function untilDone(poll, status) {
  const deadline = Date.now() + TIMEOUT_MS;
  while (status.state !== "TRANSFER_STATE_DONE") {
    if (["TRANSFER_STATE_FAILED", "TRANSFER_STATE_CANCELLED"].includes(status.state)) {
      throw new Error(`transfer ${status.id} is ${status.state}: ${status.error?.code} ${status.error?.message}`);
    }
    if (Date.now() > deadline) throw new Error(`transfer ${status.id} is still ${status.state}`);
    await sleep(5);
    status = (await poll({ id: [status.id] })).transfers[0];
  }
  return status;
}

async function main() {
  const target = `unix:${SOCKET}`;
  const credentials = grpc.credentials.createInsecure();
  const sessions = new xferd.SessionService(target, credentials);
  const memory = new xferd.MemoryService(target, credentials);
  const transfers = new xferd.TransferService(target, credentials);

  const { grant, stream } = await openSession(sessions, `node-example-${process.pid}`);
  try {
    const { token } = grant;
    const submit = unary(transfers, "Submit", token);
    const poll = unary(transfers, "Poll", token);

    const nbytes = BLOCK * BLOCKS;
    const { regions } = await unary(memory, "Allocate", token)({ nbytes: [nbytes, nbytes], label: "node-example" });
    const [source, sink] = regions.map((region) => region.id);

    const pattern = randomBytes(nbytes);
    const written = await write(memory, token, source, pattern);

    // Even blocks into the first half of the sink: a strided list against one long row. The totals must be equal,
    // the shapes need not be.
    const half = nbytes / 2;
    const strided = await submit({
      op: "TRANSFER_OP_WRITE",
      local: { strided: { runs: [{ region: source, offset: 0, nbytes: BLOCK, stride: 2 * BLOCK, count: BLOCKS / 2 }] } },
      remote: { columns: { region: column([sink]), offset: column([0]), nbytes: column([half]) } },
      key: "even-blocks",
    });

    // Odd blocks, last first, into the second half: columns on both sides. One value stands for all rows.
    const odd = Array.from({ length: BLOCKS / 2 }, (_, row) => (BLOCKS - 1 - 2 * row) * BLOCK);
    const place = odd.map((_, row) => half + row * BLOCK);
    const columns = await submit({
      op: "TRANSFER_OP_READ",
      local: { columns: { region: column([sink]), offset: column(place), nbytes: column([BLOCK]) } },
      remote: { columns: { region: column([source]), offset: column(odd), nbytes: column([BLOCK]) } },
      priority: "PRIORITY_HIGH",
    });

    const done = [await untilDone(poll, strided), await untilDone(poll, columns)];
    const got = await read(memory, token, sink, nbytes);

    const even = Array.from({ length: BLOCKS / 2 }, (_, row) => 2 * row * BLOCK);
    const wanted = Buffer.concat([...even, ...odd].map((offset) => pattern.subarray(offset, offset + BLOCK)));
    const equal = got.equals(wanted);

    await unary(transfers, "Release", token)({ id: done.map((status) => status.id) });
    await unary(memory, "Free", token)({ region: [source, sink] });

    const result = {
      node: grant.node,
      written_nbytes: written,
      moved_nbytes: done.map((status) => Number(status.telemetry.moved_nbytes)),
      pieces: done.map((status) => Number(status.telemetry.pieces)),
      routes: done.map((status) => status.telemetry.route.map((hop) => hop.backend)),
      bytes_equal: equal,
    };
    console.log(JSON.stringify(result));
    return equal ? 0 : 1;
  } finally {
    stream.cancel(); // the session ends with its stream, and the daemon takes back what is left
    // Not `client.close()`: on SessionService that name is the RPC `Close`.
    for (const client of [sessions, memory, transfers]) grpc.getClientChannel(client).close();
  }
}

main().then(
  (code) => {
    process.exitCode = code;
  },
  (error) => {
    // A call that failed has a gRPC status; its text names the value, the limit and the remedy.
    const status = error.code === undefined ? "" : `${grpc.status[error.code]}: `;
    console.error(`${status}${error.details ?? error.message}`);
    process.exitCode = 1;
  },
);
