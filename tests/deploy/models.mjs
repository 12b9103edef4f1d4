// Checks custom resources, a JSON array on standard input, against the models made from their definitions.
//
// A model checks values but ignores unknown fields, as Kubernetes does by dropping them. So each object is also
// written as a literal of the model's type, where the compiler finds unknown fields.

import { execFileSync } from "node:child_process";
import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { join } from "node:path";

const packages = {
  "monitoring.coreos.com/v1": "@kubernetes-models/prometheus-operator",
  "keda.sh/v1alpha1": "@kubernetes-models/keda",
  "gateway.networking.k8s.io/v1": "@kubernetes-models/gateway-api",
  "cloud.google.com/v1": "@kubernetes-models/gke",
  "cert-manager.io/v1": "@kubernetes-models/cert-manager",
};

const modelOf = ({ apiVersion, kind }) => `${packages[apiVersion]}/${apiVersion}/${kind}`;

async function complaint(object) {
  const { [object.kind]: Model } = await import(modelOf(object));
  try {
    new Model(object).validate();
    return [];
  } catch (error) {
    return [`${object.kind} ${object.metadata.name}: ${error.message}`];
  }
}

/** What the compiler says of the objects as literals. */
function unknownFields(objects) {
  // Beside this file, so that packages are found from there.
  const directory = mkdtempSync(join(import.meta.dirname, ".models-"));
  try {
    const text = objects.map((object, index) => [
      `import type { I${object.kind} as Type${index} } from "${modelOf(object)}";`,
      `export const object${index}: Type${index} = ${JSON.stringify(object, null, 1)};`,
    ]);
    writeFileSync(join(directory, "objects.ts"), text.flat().join("\n"));
    const options = ["--noEmit", "--strict", "--skipLibCheck", "--module", "nodenext", "--ignoreConfig"];
    execFileSync(join(import.meta.dirname, "node_modules/.bin/tsc"), [...options, join(directory, "objects.ts")]);
    return [];
  } catch (error) {
    return [String(error.stdout ?? error)];
  } finally {
    rmSync(directory, { recursive: true });
  }
}

let text = "";
for await (const chunk of process.stdin) text += chunk;
const objects = JSON.parse(text);
const complaints = (await Promise.all(objects.map(complaint))).flat().concat(unknownFields(objects));
for (const line of complaints) process.stderr.write(`${line}\n`);
if (complaints.length > 0) process.exit(1);
process.stdout.write(`${objects.length} custom resources are sound\n`);
