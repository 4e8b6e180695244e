// Checks custom resources, a JSON list on stdin, against the schemas below NODE_MODULES; prints one line a fault.
//   node test/custom_resources.mjs NODE_MODULES
import { readdirSync, readFileSync } from "node:fs";
import { pathToFileURL } from "node:url";

const [modules] = process.argv.slice(2);
const packages = { "keda.sh": "keda", "monitoring.coreos.com": "prometheus-operator" };
const embedded = ["@kubernetes-models/apimachinery/apis/meta/v1", "kubernetes-models/autoscaling/v2"];
const free = new Set(["metadata", "labels", "annotations", "matchLabels"]); // maps whose keys are anybody's

function fieldsOf(folder) {
  const names = new Set();
  for (const place of [folder, ...embedded.map((name) => `${modules}/${name}`)]) {
    for (const file of readdirSync(place, { recursive: true }).filter((name) => name.endsWith(".d.ts"))) {
      for (const [, name] of readFileSync(`${place}/${file}`, "utf8").matchAll(/^\s+"(\w+)"\??:/gm)) names.add(name);
    }
  }
  return names;
}

function* unknown(value, fields, path) {
  if (Array.isArray(value)) {
    for (const [index, item] of value.entries()) yield* unknown(item, fields, `${path}[${index}]`);
  } else if (value !== null && typeof value === "object") {
    for (const [key, item] of Object.entries(value)) {
      if (!fields.has(key)) yield `${path}.${key}: an unknown field`;
      if (!free.has(key)) yield* unknown(item, fields, `${path}.${key}`);
    }
  }
}

for (const resource of JSON.parse(readFileSync(0, "utf8"))) {
  const [group, version] = resource.apiVersion.split("/");
  const folder = `${modules}/@kubernetes-models/${packages[group]}/${group}`;
  const place = `${resource.kind} ${resource.metadata.name}`;
  // The schemas are silent about these.
  for (const fault of unknown(resource, fieldsOf(folder), place)) console.log(fault);
  const { [resource.kind]: Model } = await import(pathToFileURL(`${folder}/${version}/${resource.kind}.js`));
  try {
    new Model(resource).validate();
  } catch (error) {
    console.log(`${place}: ${error.message}`);
  }
}
