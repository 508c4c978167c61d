// Words out of subwords, and the difference of two texts.

const MARK = /^[^\p{L}\p{N}\p{M}'’-]+$/u; // an apostrophe or a hyphen is a part of its word
const BYTE = /^<0x([0-9A-F]{2})>$/;

/**
 * @typedef {Object} Word
 * @property {string} text
 * @property {boolean} isMark punctuation
 * @property {boolean} isSpaced a space precedes it
 * @property {number[]} pieces indices of its subwords
 * @property {?number} probability the product of theirs
 */

/** Return the text of subwords, some of which may be single bytes. */
function spell(pieces) {
  const encoder = new TextEncoder();
  const bytes = pieces.flatMap((piece) => {
    const byte = BYTE.exec(piece);
    return byte ? [Number.parseInt(byte[1], 16)] : [...encoder.encode(piece.replaceAll("▁", " "))];
  });
  return new TextDecoder().decode(new Uint8Array(bytes)).trim();
}

/** Return the words and punctuation marks that subwords spell: ▁ begins a word. @returns {Word[]} */
export function wordsOf(pieces, probabilities = []) {
  const words = [];
  for (const [i, piece] of pieces.entries()) {
    const isSpaced = piece.startsWith("▁");
    const letters = isSpaced ? piece.slice(1) : piece;
    const isMark = MARK.test(letters) && !BYTE.test(letters);
    const last = words.at(-1);
    if (last && !isSpaced && (last.isEmpty || last.isMark === isMark)) {
      last.pieces.push(i);
      last.isMark = isMark;
      last.isEmpty = false;
    } else words.push({ isMark, isSpaced: isSpaced && i > 0, isEmpty: letters === "", pieces: [i] });
  }
  return words.map(({ isMark, isSpaced, pieces: indices }) => ({
    text: spell(indices.map((i) => pieces[i])),
    isMark,
    isSpaced,
    pieces: indices,
    probability: product(indices.map((i) => probabilities[i] ?? null)),
  }));
}

const product = (numbers) => (numbers.includes(null) ? null : numbers.reduce((a, b) => a * b, 1));

/** Return the text before a word. */
export function textBefore(words, index) {
  return words
    .slice(0, index)
    .map((word) => (word.isSpaced ? " " : "") + word.text)
    .join("");
}

/** Return, for each word of two texts, whether the longest common subsequence holds it. */
export function commonWords(a, b) {
  const lengths = Array.from({ length: a.length + 1 }, () => new Uint32Array(b.length + 1));
  for (let i = a.length - 1; i >= 0; i--) {
    for (let j = b.length - 1; j >= 0; j--) {
      lengths[i][j] = a[i] === b[j] ? lengths[i + 1][j + 1] + 1 : Math.max(lengths[i + 1][j], lengths[i][j + 1]);
    }
  }
  const kept = [a.map(() => false), b.map(() => false)];
  for (let i = 0, j = 0; i < a.length && j < b.length; ) {
    if (a[i] === b[j]) {
      kept[0][i++] = true;
      kept[1][j++] = true;
    } else if (lengths[i + 1][j] >= lengths[i][j + 1]) i++;
    else j++;
  }
  return kept;
}
