// Tokens from an implementation that shares nothing with the node's: Node.js on OpenSSL.
// Usage: node issuer.mjs CLAIMS
//
// Prints one list: for each algorithm a new key, its public part, and CLAIMS signed with it.

import { constants, createHmac, generateKeyPairSync, randomBytes, sign } from "node:crypto";

const claims = process.argv[2];
const part = (text) => Buffer.from(text).toString("base64url");
const rsa = () => generateKeyPairSync("rsa", { modulusLength: 2048 });
const pss = (saltLength) => ({ padding: constants.RSA_PKCS1_PSS_PADDING, saltLength });
const ec = (namedCurve) => generateKeyPairSync("ec", { namedCurve });
const raw = { dsaEncoding: "ieee-p1363" };

const algorithms = {
  HS256: { hash: "sha256", secret: 32 },
  HS384: { hash: "sha384", secret: 48 },
  HS512: { hash: "sha512", secret: 64 },
  RS256: { hash: "sha256", keys: rsa() },
  RS384: { hash: "sha384", keys: rsa() },
  RS512: { hash: "sha512", keys: rsa() },
  PS256: { hash: "sha256", keys: rsa(), options: pss(32) },
  PS384: { hash: "sha384", keys: rsa(), options: pss(48) },
  PS512: { hash: "sha512", keys: rsa(), options: pss(64) },
  ES256: { hash: "sha256", keys: ec("P-256"), options: raw },
  ES384: { hash: "sha384", keys: ec("P-384"), options: raw },
  EdDSA: { hash: null, keys: generateKeyPairSync("ed25519") },
};

const issued = Object.entries(algorithms).map(([algorithm, { hash, secret, keys, options }]) => {
  const kid = `key of ${algorithm}`;
  const text = `${part(JSON.stringify({ alg: algorithm, kid, typ: "JWT" }))}.${part(claims)}`;
  if (secret) {
    const shared = randomBytes(secret).toString("hex");
    const signature = createHmac(hash, shared).update(text).digest("base64url");
    return { algorithm, kid, secret: shared, token: `${text}.${signature}` };
  }
  const signature = sign(hash, Buffer.from(text), { key: keys.privateKey, ...options }).toString("base64url");
  return {
    algorithm,
    kid,
    pem: keys.publicKey.export({ type: "spki", format: "pem" }),
    jwk: { ...keys.publicKey.export({ format: "jwk" }), kid, alg: algorithm, use: "sig" },
    token: `${text}.${signature}`,
  };
});
process.stdout.write(JSON.stringify(issued));
