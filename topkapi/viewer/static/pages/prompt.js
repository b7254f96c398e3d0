export const title = () => "Prompt";
export function open() { return {}; }
