//! The small runtimes that inputs run in: a lasting one for what waits for nothing, a new one for what starts tasks.

use std::future::Future;

use tokio::runtime::{Builder, Runtime};

thread_local! {
    static RUNTIME: Runtime = build();
}

fn build() -> Runtime {
    Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime without threads needs nothing but two descriptors")
}

/// Runs a future to its end. What it starts would go on with the next one: see [`block_on_alone`].
pub fn block_on<T>(work: impl Future<Output = T>) -> T {
    RUNTIME.with(|runtime| runtime.block_on(work))
}

/// Runs a future to its end in a runtime of its own; tasks that it leaves behind end with it.
pub fn block_on_alone<T>(work: impl Future<Output = T>) -> T {
    build().block_on(work)
}
